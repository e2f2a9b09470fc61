"""Raw spool -> segments in the spool.

A *window* is a span of the raw spool that becomes one segment. A second with more than ``WINDOW_BYTES`` becomes several
windows; all but the last are flagged ``CONTINUES``. Windows, not seconds, bound the memory.

A bio whose last record is not below the end of the window is *open*: its records are left for the next window, which
reads them again from where they begin (``Cursor.resume``). So nothing of it has to be kept, across restarts either.

    raw      ──────┬───────────────────┬───────────
    bio 7      ·a  │ ·b                │                a, b in window 1 → first cut of 7 is the window before
    window 1 ──────┤  left out of it   │
    window 2       └──── a and b, then the window's own records ────
"""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from cdp.agent.capture.layout import RECORD_BYTES
from cdp.agent.capture.record import Records, is_abandoned, is_last
from cdp.agent.capture.spool import Mark, RawSpool
from cdp.agent.coalesce import Pieces, gather, last_writers
from cdp.agent.copy import Copier
from cdp.agent.dirty import DirtyMap
from cdp.agent.intervals import U64, Intervals, keys
from cdp.agent.spool import Spool, Spooled
from cdp.agent.state import Cursor
from journal.encoder import Encoder
from journal.segment import Flags

WINDOW_BYTES: Final = RECORD_BYTES * 3072
"""About 12 MiB: with what a copy adds, an encoded segment and its raw form together stay below 64 MiB."""
OPEN_NS_MAX: Final = 250_000_000
"""How long an open bio is waited for. The kernel side emits a bio within microseconds; one that stays open did not fit
into the ring, and keeping the raw spool for it would fill that as well. Should it go on after all, nothing is lost
either: its beginning is marked dirty."""
HURRIED_LEVEL: Final = -5
"""Twice as fast as the usual level, for somewhat larger segments."""
_NO_COPY: Final = np.zeros(0, np.uint8)
_BATCH_BYTES: Final = RECORD_BYTES * 4096


@dataclass(frozen=True, slots=True)
class Cut:
    """Where and when a segment ends. Times in ns; ``wall_ns`` since the epoch."""

    position: int
    monotonic_ns: int
    wall_ns: int

    @classmethod
    def at(cls, mark: Mark) -> Cut:
        return cls(mark.position, mark.monotonic_ns, time.time_ns() - (time.monotonic_ns() - mark.monotonic_ns))


@dataclass(slots=True)
class Window:
    """The records of one window that count: whole bios only, in submission order."""

    batches: list[Records]
    starts: U64
    ends: U64
    kinds: npt.NDArray[np.uint8]
    rows: npt.NDArray[np.int64]
    open_bios: dict[int, int] = field(default_factory=dict)
    lost: Intervals = field(default_factory=Intervals)

    def pieces(self) -> Pieces:
        found = last_writers(self.starts, self.ends, self.kinds)
        # last_writers counts the records that it was given; the payload is found by their number in the batches.
        return Pieces(found.starts, found.ends, found.kinds, self.rows[found.sources], found.source_offsets)


class Sealer:
    """Works in the worker thread; the zstandard compressor inside may serve one thread only."""

    def __init__(self, machine: uuid.UUID, spool: Spool, raw: RawSpool) -> None:
        self._encoder = Encoder(machine)
        self._hurried = Encoder(machine, HURRIED_LEVEL)
        self._spool = spool
        self._raw = raw

    def seal(
        self,
        cursor: Cursor,
        end: int,
        cut: Cut,
        *,
        flags: Flags,
        dirty: DirtyMap,
        copier: Copier | None,
        final: bool,
        hurry: bool = False,
    ) -> tuple[Cursor, Spooled]:
        """One segment of raw positions ``[cursor.raw, end)``, durable in the spool together with the new cursor.

        ``copier``: its round is reading; ``final``: the cut is at ``end``, so that what was copied may go along.
        ``hurry``: there is much to catch up with.
        """
        window = self._window(cursor, end, cut.monotonic_ns if final or end == cursor.raw else None)
        dirty.mark(window.lost.starts, window.lost.ends)
        pieces = window.pieces()
        copied = _NO_COPY
        if copier is not None:
            copier.track(Intervals.of(pieces.starts, pieces.ends))
            if final:
                pieces = pieces.with_copies(copier.take())
                copied = copier.buffer
        header, raw = (self._hurried if hurry else self._encoder).encode(
            cursor.position,
            pieces.extents(),
            gather(pieces, [batch["payload"] for batch in window.batches], copied),
            opened_at_ns=min(cursor.sealed_at_ns or cut.wall_ns, cut.wall_ns),
            sealed_at_ns=cut.wall_ns,
            sealed_monotonic_ns=cut.monotonic_ns,
            flags=flags if final else flags | Flags.CONTINUES,
        )
        entry = self._spool.put(header, raw)
        after = msgspec.structs.replace(
            cursor,
            tip=str(header.position),
            sealed_at_ns=cut.wall_ns,
            raw=end,
            resume=min(window.open_bios.values(), default=end),
            open_bios=window.open_bios,
            dirty=dirty.pack(),
        )
        self._spool.commit(after)
        self._raw.release(after.resume)
        return after, entry

    def drop(self, cursor: Cursor, end: int, dirty: DirtyMap) -> Cursor:
        """Give up what was captured in ``[cursor.raw, end)``: its ranges are marked, its bytes are not kept."""
        for low, high, bios in ((cursor.resume, cursor.raw, cursor.open_bios), (cursor.raw, end, None)):
            for batch in self._raw.read(low, high, _BATCH_BYTES):
                records = batch if bios is None else batch[np.isin(batch["bio"], _u64(bios))]
                starts, ends = _ranges(records)
                dirty.mark(starts, ends)
        after = msgspec.structs.replace(cursor, raw=end, resume=end, open_bios={}, dirty=dirty.pack())
        self._spool.commit(after)
        self._raw.release(end)
        return after

    def _window(self, cursor: Cursor, end: int, now_ns: int | None) -> Window:
        """``now_ns``: by when whatever was submitted lies below ``end``; None if more of the same moment may follow
        there, as when a backlog is sealed window by window."""
        batches: list[Records] = []
        if cursor.open_bios:
            wanted = _u64(cursor.open_bios)
            for batch in self._raw.read(cursor.resume, cursor.raw, _BATCH_BYTES):
                mine = np.isin(batch["bio"], wanted)
                if mine.any():
                    batches.append(batch[mine])
        batches += self._raw.read(cursor.raw, end, _BATCH_BYTES)
        batches = [batch for batch in batches if len(batch)]
        if not batches:
            nothing = np.zeros(0, np.uint64)
            # A bio whose records cannot be found any more was given back by the kernel side, which stamped it.
            return Window([], nothing, nothing, np.zeros(0, np.uint8), np.zeros(0, np.int64))
        bios = np.concatenate([batch["bio"] for batch in batches])
        done = np.isin(bios, np.concatenate([batch["bio"][is_last(batch)] for batch in batches]))
        given_up = np.concatenate([batch["bio"][is_abandoned(batch)] for batch in batches])
        void = np.isin(bios, given_up) if len(given_up) else np.zeros(len(bios), np.bool_)
        parts = [_ranges(batch) for batch in batches]
        starts = np.concatenate([part[0] for part in parts])
        ends = np.concatenate([part[1] for part in parts])
        kinds = np.concatenate([batch["op"] for batch in batches])
        rows = np.flatnonzero(done & ~void)
        window = Window(batches, starts[rows], ends[rows], kinds[rows], rows)
        unfinished = np.flatnonzero(~done & ~void)
        if len(unfinished):
            submitted = np.concatenate([batch["submitted_ns"] for batch in batches])
            # A bio that the end of a window cuts in two is as old as its neighbours, however late it is sealed.
            now = submitted.max() if now_ns is None else np.uint64(now_ns)
            late = submitted[unfinished] + np.uint64(OPEN_NS_MAX) < now
            gone = unfinished[late]
            window.lost = Intervals.of(starts[gone], ends[gone])
            for bio in np.unique(bios[unfinished[~late]]).tolist():
                window.open_bios[bio] = cursor.open_bios.get(bio, cursor.raw)
        return window


def _ranges(records: Records) -> tuple[U64, U64]:
    starts = keys(records["disk"], records["offset"])
    return starts, starts + records["length"]


def _u64(bios: dict[int, int]) -> U64:
    return np.fromiter(bios, np.uint64, len(bios))
