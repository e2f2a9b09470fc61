"""A raw spool written by hand, in the layout that the drainer writes."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import numpy as np

from cdp.agent.capture import layout
from cdp.agent.capture.layout import CHUNK_BYTES, RECORD_BYTES
from cdp.agent.capture.record import RECORD
from cdp.agent.capture.spool import RawSpool

CAPTURE = 0xABCDEF


class HandWritten:
    """``write`` appends records; ``bio`` numbers are the caller's."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self._directory = directory
        self._fields = [0] * 11
        self._fields[layout.F_MAGIC] = layout.STATE_MAGIC
        self._fields[layout.F_VERSION] = layout.STATE_VERSION
        self._fields[layout.F_CAPTURE_ID] = CAPTURE
        with (directory / layout.STATE_FILE).open("wb") as file:
            file.truncate(layout.STATE_BYTES)
        self._save()
        self.raw = RawSpool.open(directory, CAPTURE)
        self.position = 0

    def write(
        self,
        bio: int,
        offset: int,
        payload: bytes | None,
        *,
        length: int = 0,
        flags: int = layout.LAST,
        op: int = 1,
        disk: int = 0,
        submitted_ns: int | None = None,
    ) -> int:
        """One record; the position behind it."""
        record = np.zeros(1, RECORD)
        record["ring_length"] = RECORD_BYTES - layout.RING_HEADER_BYTES
        record["bio"], record["offset"], record["disk"] = bio, offset, disk
        record["length"] = length if payload is None else len(payload)
        record["op"], record["flags"] = op, flags
        record["submitted_ns"] = time.monotonic_ns() if submitted_ns is None else submitted_ns
        if payload is not None:
            record["payload"][0, : len(payload)] = np.frombuffer(payload, np.uint8)
        base = layout.chunk_start(self.position)
        with (self._directory / layout.chunk_name(base)).open("ab") as file:
            file.truncate(CHUNK_BYTES)
        with (self._directory / layout.chunk_name(base)).open("r+b") as file:
            file.seek(self.position - base)
            file.write(record.tobytes())
        self.position += RECORD_BYTES
        self._fields[layout.F_DRAINED] = self.position
        self._fields[layout.F_RELEASED] = self.raw.released
        self._save()
        return self.position

    def _save(self) -> None:
        with (self._directory / layout.STATE_FILE).open("r+b") as file:
            file.write(struct.pack("<11Q", *self._fields))
