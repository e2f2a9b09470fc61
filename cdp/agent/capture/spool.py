"""The reader of the raw spool.

    raw-0000000000000000   raw-0000000000ffe100   …       state              poke
    └ records by ring position, CHUNK_BYTES each  ┘       └ fields, marks     └ wakes the drainer

The offset inside the files *is* the ring position, so that neither side needs an index and a copy that was repeated
after a crash lands where it was. Invariant: ``released <= drained``; the files between them are complete.
The drainer writes data, then ``drained``, then frees the ring; the reader writes ``released`` only.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cdp.agent.capture import layout
from cdp.agent.capture.errors import SpoolMissing, SpoolRangeGone
from cdp.agent.capture.layout import CHUNK_BYTES, MARKS, RECORD_BYTES, STATE_BYTES, STATE_HEADER_BYTES
from cdp.agent.capture.record import RECORD, Records, without_discarded

BATCH_BYTES = RECORD_BYTES * 256
"""About 1 MiB: what one step of ``read`` yields at most."""
_MARK_POLL_S = 0.002


@dataclass(frozen=True, slots=True)
class Mark:
    """Everything submitted before ``monotonic_ns`` (CLOCK_MONOTONIC) lies below ring position ``position``."""

    monotonic_ns: int
    position: int


class RawSpool:
    """One reader; the drainer is in another process, and either may be restarted at any time."""

    def __init__(self, directory: Path, state: mmap.mmap) -> None:
        self._directory = directory
        self._state = state
        self._fields = memoryview(state)[:STATE_HEADER_BYTES].cast("Q")
        self._marks = memoryview(state)[STATE_HEADER_BYTES:].cast("Q")
        self._chunk: tuple[int, mmap.mmap] | None = None

    @classmethod
    def open(cls, directory: Path, capture_id: int) -> RawSpool:
        """Raises ``SpoolMissing`` until a drainer of this capture has created the spool."""
        missing = SpoolMissing(
            f"There is no raw spool of capture {capture_id:016x} in {directory}.",
            remedy="It appears when the drainer starts; see the agent's log if it does not.",
            directory=str(directory),
        )
        try:
            fd = os.open(directory / layout.STATE_FILE, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            raise missing from None
        try:
            if os.fstat(fd).st_size != STATE_BYTES:
                raise missing
            spool = cls(directory, mmap.mmap(fd, STATE_BYTES))
        finally:
            os.close(fd)
        fields = spool._fields
        if (fields[layout.F_MAGIC], fields[layout.F_VERSION]) != (layout.STATE_MAGIC, layout.STATE_VERSION):
            raise missing
        if spool.capture_id != capture_id:
            raise missing
        return spool

    def close(self) -> None:
        self._chunk = None
        self._fields.release()
        self._marks.release()
        self._state.close()

    # --- positions ----------------------------------------------------------------------------------------------------
    @property
    def capture_id(self) -> int:
        return self._fields[layout.F_CAPTURE_ID]

    @property
    def drained(self) -> int:
        """Every record below this ring position is in the spool."""
        return self._fields[layout.F_DRAINED]

    @property
    def released(self) -> int:
        return self._fields[layout.F_RELEASED]

    @property
    def stalled_passes(self) -> int:
        """How often the drainer found the spool full; while it grows, the ring fills and writes are being lost."""
        return self._fields[layout.F_STALLED_PASSES]

    @property
    def drainer_pass_ns(self) -> int:
        """CLOCK_MONOTONIC of the drainer's last pass: a drainer that lives passes ten times a second."""
        return self._fields[layout.F_PASS_NS]

    @property
    def realtime(self) -> bool:
        return self._fields[layout.F_REALTIME] == 1

    def release(self, position: int) -> None:
        """Nothing below ``position`` will be read again; its views become invalid. Never goes backwards."""
        if not self.released <= position <= self.drained:
            raise SpoolRangeGone(
                f"Position {position} cannot be released: released {self.released}, drained {self.drained}.",
                remedy="Restart the agent; if it repeats, its state directory belongs to another capture.",
                position=position,
            )
        if self._chunk is not None and self._chunk[0] + CHUNK_BYTES <= position:
            self._chunk = None
        self._fields[layout.F_RELEASED] = position

    # --- marks --------------------------------------------------------------------------------------------------------
    def newest_mark(self) -> Mark | None:
        count = self._fields[layout.F_MARK_COUNT]
        return self._mark(count - 1) if count else None

    def marks(self) -> list[Mark]:
        """All that are still held, oldest first, both columns ascending."""
        count = self._fields[layout.F_MARK_COUNT]
        held = [(ordinal, self._mark(ordinal)) for ordinal in range(max(0, count - MARKS + 1), count)]
        # Whatever the drainer wrote meanwhile has replaced the oldest ones.
        oldest = self._fields[layout.F_MARK_COUNT] - MARKS
        return [mark for ordinal, mark in held if ordinal > oldest]

    def find_mark(self, after_ns: int) -> Mark | None:
        """The first mark that is still held with ``monotonic_ns >= after_ns``; None if there is none yet."""
        count = self._fields[layout.F_MARK_COUNT]
        if count == 0 or self._mark(count - 1).monotonic_ns < after_ns:
            return None
        # One slot is left out: the drainer may be writing mark ``count`` into the place of mark ``count - MARKS``.
        low, high = max(0, count - MARKS + 1), count - 1
        while low < high:
            middle = (low + high) // 2
            if self._mark(middle).monotonic_ns < after_ns:
                low = middle + 1
            else:
                high = middle
        found = self._mark(low)
        if self._fields[layout.F_MARK_COUNT] - low >= MARKS:
            return self.find_mark(after_ns)
        return found

    async def wait_mark(self, after_ns: int, deadline_s: float = 10.0) -> Mark:
        """``find_mark``, waiting for the drainer. Raises ``TimeoutError``: it is dead, or the spool is full."""
        end = time.monotonic() + deadline_s
        wait_s = (after_ns - time.monotonic_ns()) / 1e9
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        while (mark := self.find_mark(after_ns)) is None:
            if time.monotonic() > end:
                raise TimeoutError(f"no mark after {after_ns} within {deadline_s} s")
            self.poke()
            await asyncio.sleep(_MARK_POLL_S)
        return mark

    def poke(self) -> None:
        """Wake the drainer for a pass at once; without it an idle drainer looks ten times a second."""
        try:
            fd = os.open(self._directory / layout.POKE_FILE, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return  # no drainer: whoever waits for a mark has a deadline
        try:
            os.write(fd, b"\0")
        except BlockingIOError:
            return  # poked often enough
        finally:
            os.close(fd)

    def _mark(self, ordinal: int) -> Mark:
        at = ordinal % MARKS * 2
        return Mark(self._marks[at], self._marks[at + 1])

    # --- records ------------------------------------------------------------------------------------------------------
    def read(self, start: int, end: int, batch_bytes: int = BATCH_BYTES) -> Iterator[Records]:
        """The records of ring positions ``[start, end)`` in submission order, as views of at most ``batch_bytes``.

        A view is valid until its positions are released. Raises ``SpoolRangeGone``.
        """
        if not self.released <= start <= end <= self.drained or start % RECORD_BYTES or end % RECORD_BYTES:
            raise SpoolRangeGone(
                f"Positions {start}..{end} are not in the raw spool ({self.released}..{self.drained}).",
                remedy="Start a resync: what was written in between is not known.",
                start=start,
                end=end,
            )
        step = max(RECORD_BYTES, batch_bytes - batch_bytes % RECORD_BYTES)
        while start < end:
            base = layout.chunk_start(start)
            stop = min(end, base + CHUNK_BYTES, start + step)
            records = np.frombuffer(self._map(base), RECORD, (stop - start) // RECORD_BYTES, start - base)
            yield without_discarded(records)
            start = stop

    def _map(self, base: int) -> mmap.mmap:
        if self._chunk is None or self._chunk[0] != base:
            fd = os.open(self._directory / layout.chunk_name(base), os.O_RDONLY | os.O_CLOEXEC)
            try:
                self._chunk = (base, mmap.mmap(fd, CHUNK_BYTES, prot=mmap.PROT_READ))
            finally:
                os.close(fd)
        return self._chunk[1]
