"""Extents and payload -> the bytes of a segment.

The encoder takes the payload as chunks of any size, so that the caller never has to hold it in one piece, and keeps
only the compressed frames.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from typing import Final

import numpy as np
import zstandard
from blake3 import blake3

from journal.extent import Extents
from journal.position import DIGEST_BYTES, Position
from journal.segment import (
    EXTENTS_MAX,
    FRAME_BYTES,
    FRAME_RAW,
    HEADER_BYTES,
    PAYLOAD_BYTES_MAX,
    Flags,
    Header,
)

ZSTD_LEVEL: Final = 1
"""Measured on database pages: level 1 gives most of the ratio at 1 GB/s; see docs/decisions."""


class Encoder:
    """Encodes segments one after another. Not thread-safe: a zstandard compressor may serve one thread only."""

    def __init__(self, machine: uuid.UUID, level: int = ZSTD_LEVEL) -> None:
        self._machine = machine
        self._compressor = zstandard.ZstdCompressor(level=level, write_checksum=False, write_content_size=True)

    def encode(
        self,
        previous: Position,
        extents: Extents,
        payload: Iterable[bytes | bytearray | memoryview],
        *,
        opened_at_ns: int,
        sealed_at_ns: int,
        sealed_monotonic_ns: int,
        flags: Flags = Flags.NONE,
    ) -> tuple[Header, bytearray]:
        """The segment that follows ``previous``: its header and all of its bytes.

        ``payload`` yields the bytes of the data extents in table order. Raises ``SegmentDamaged`` if the table breaks
        an invariant and ``ValueError`` if the payload does not match it or a limit is exceeded.
        """
        extents.check()
        if len(extents) > EXTENTS_MAX:
            raise ValueError(f"{len(extents)} extents are more than a segment holds ({EXTENTS_MAX})")
        if extents.payload_bytes > PAYLOAD_BYTES_MAX:
            raise ValueError(f"{extents.payload_bytes} bytes are more than a segment holds ({PAYLOAD_BYTES_MAX})")
        frames: list[bytes | memoryview] = []
        stored: list[int] = []
        total = 0
        for frame in _frames(payload):
            packed: bytes = self._compressor.compress(frame)
            total += len(frame)
            if len(packed) < len(frame):
                frames.append(packed)
                stored.append(len(packed))
            else:
                frames.append(bytes(frame))
                stored.append(len(frame) | FRAME_RAW)
        if total != extents.payload_bytes:
            raise ValueError(f"payload of {total} bytes for extents of {extents.payload_bytes}")
        table = pack_table(extents, stored)
        payload_hasher = blake3()
        for packed_frame in frames:
            payload_hasher.update(packed_frame)
        header = Header(
            machine=self._machine,
            generation=previous.generation,
            seq=previous.seq + 1,
            flags=flags,
            opened_at_ns=opened_at_ns,
            sealed_at_ns=sealed_at_ns,
            sealed_monotonic_ns=sealed_monotonic_ns,
            extent_count=len(extents),
            frame_count=len(frames),
            table_bytes=len(table),
            payload_bytes=total,
            payload_stored_bytes=sum(length & ~FRAME_RAW for length in stored),
            previous=previous.digest,
            table_digest=blake3(table).digest(),
            payload_digest=payload_hasher.digest(),
            digest=bytes(DIGEST_BYTES),
        )
        segment = bytearray(header.pack())
        segment += table
        for packed_frame in frames:
            segment += packed_frame
        return Header.unpack(memoryview(segment)[:HEADER_BYTES]), segment


def pack_table(extents: Extents, stored: list[int]) -> bytes:
    """Extent table and frame table, as laid out in ``journal.segment``."""
    columns = b"".join(
        (
            extents.offsets.astype("<u8").tobytes(),
            extents.lengths.astype("<u8").tobytes(),
            extents.disks.astype("<u2").tobytes(),
            extents.kinds.astype("u1").tobytes(),
        )
    )
    return columns + bytes(-len(columns) % 8) + np.array(stored, "<u4").tobytes()


def _frames(payload: Iterable[bytes | bytearray | memoryview]) -> Iterable[bytes | bytearray | memoryview]:
    """Re-cut chunks of any size into frames of exactly ``FRAME_BYTES``, the last one shorter."""
    held = bytearray()
    for chunk in payload:
        view = memoryview(chunk).cast("B")
        if held:
            take = min(FRAME_BYTES - len(held), len(view))
            held += view[:take]
            view = view[take:]
            if len(held) == FRAME_BYTES:
                yield held
                held = bytearray()
        if not held:
            whole = len(view) // FRAME_BYTES * FRAME_BYTES
            for start in range(0, whole, FRAME_BYTES):
                yield view[start : start + FRAME_BYTES]
            held += view[whole:]
    if held:
        yield held
