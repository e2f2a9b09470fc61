"""The point-in-time index of one machine: who wrote this sector last, as of any stored position?

    segments   1 ........................................................ tip
    runs       [ large ][ large ][ mid ][ mid ][ small ][ small ] tail
               on disk ──────────────────────────────────────────  memory

Each new segment's extents join the tail. A full tail becomes a small run on disk; ``FAN`` runs of a size become one of
the next size. A question is put to each run (two binary searches a class), and the newest answer for each sector wins:
there are no checkpoints, and no second is dearer than another.

All of it is derived. Runs that are missing, damaged or of another history (their last digest tells) are built again
from the segments.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from cdp.store.errors import RunDamaged
from cdp.store.records import Entry, Span
from cdp.store.resolve import Pieces, resolve
from cdp.store.runs import RUN_SEGMENTS_MAX, U64, Found, MemoryRun, Run, build, count, find, merge, pack_extents
from journal.extent import SECTOR_BYTES, Extents
from journal.position import Position

TAIL_ENTRIES_MAX: Final = 1 << 16
TAIL_SEGMENTS_MAX: Final = 1 << 10
FAN: Final = 8
_ENTRIES_READ: Final = 1024
RUN_ENTRIES_MAX: Final = 5 << 20
"""80 MiB, a little more than two merges of full tails make: larger runs are not merged any further, which bounds the
memory of a merge."""
_FAILURES_MAX: Final = 8
"""Runs that vanish or turn out damaged while one question is answered; more means that the disk is broken."""
_WINDOW_ENTRIES_MAX: Final = 1 << 18
_WINDOW_SECTORS_MIN: Final = (1 << 20) // SECTOR_BYTES
_WINDOW_SECTORS_MAX: Final = (256 << 20) // SECTOR_BYTES


class Source(Protocol):
    """Where the extent tables come from."""

    def entries(self, span: Span, limit: int) -> list[Entry]:
        """At most ``limit`` stored segments of a span, in order."""

    def extents(self, entry: Entry) -> Extents: ...


class Shelf(Protocol):
    """Where runs are kept over a restart."""

    def runs(self, generation: int) -> list[Run]:
        """Those that can be trusted, in order and without overlap."""

    def keep(self, run: MemoryRun) -> Run: ...

    def drop(self, run: Run) -> None: ...

    def is_named(self, run: Run, name: str) -> bool:
        """Is it the one that ``RunDamaged`` calls ``file``?"""


@dataclass(slots=True, eq=False)
class _Generation:
    runs: list[Run]
    tail: list[tuple[Position, U64, U64]] = field(default_factory=list)
    tail_run: MemoryRun | None = None
    tail_entries: int = 0

    @property
    def last(self) -> int:
        """The last segment that is indexed; 0 at first."""
        if self.tail:
            return self.tail[-1][0].seq
        return self.runs[-1].last if self.runs else 0

    def all_runs(self) -> list[Run]:
        if self.tail and self.tail_run is None:
            self.tail_run = build(self.tail)
        return [*self.runs, self.tail_run] if self.tail_run is not None else self.runs

    def clear_tail(self) -> None:
        self.tail, self.tail_run, self.tail_entries = [], None, 0


class Versions:
    """Thread-safe."""

    def __init__(self, source: Source, shelf: Shelf, *, tail_segments_max: int = TAIL_SEGMENTS_MAX) -> None:
        self._source = source
        self._tail_segments_max = tail_segments_max
        self._shelf = shelf
        self._generations: dict[int, _Generation] = {}
        self._lock = threading.Lock()

    def catch_up(self, spans: Sequence[Span], stop: Callable[[], bool] = lambda: False) -> None:
        """Index every segment of ``spans`` that is not yet. Returns early once ``stop()``."""
        for failures in itertools.count(1):
            try:
                self._catch_up(spans, stop)
                return
            except (RunDamaged, FileNotFoundError) as error:
                if failures > _FAILURES_MAX:
                    raise
                self.discard(error)

    def _catch_up(self, spans: Sequence[Span], stop: Callable[[], bool]) -> None:
        for span in spans:
            while not stop():
                with self._lock:
                    generation = self._generation(span)
                    first = max(span.first, generation.last + 1)
                    if first > span.last:
                        break
                    entries = self._source.entries(Span(span.generation, first, span.last), _ENTRIES_READ)
                    if not entries:
                        break
                    self._add(generation, entries)

    def behind(self, span: Span) -> int:
        """How many segments of ``span`` are not indexed yet."""
        with self._lock:
            return max(0, span.last - max(span.first - 1, self._generation(span).last))

    def forget(self, generation: int, seq: int) -> None:
        """Segments up to ``seq`` are gone: drop the runs that tell of nothing else."""
        with self._lock:
            known = self._generations.get(generation)
            for run in list(known.runs) if known is not None else self._shelf.runs(generation):
                if run.last <= seq:
                    if known is not None:
                        known.runs.remove(run)
                    self._shelf.drop(run)

    def pieces(self, spans: Sequence[Span], disk: int, offset: int, length: int) -> Iterator[Pieces]:
        """The parts of a byte range, in order, as of the end of ``spans``. Call ``catch_up`` first. Offsets and lengths
        are multiples of 512."""
        at, stop = offset // SECTOR_BYTES, (offset + length) // SECTOR_BYTES
        failures = 0
        runs = self._runs(spans)
        while at < stop:
            try:
                end = _window(runs, disk, at, stop)
                found: list[tuple[int, Found]] = []
                for number, run in runs:
                    seqs = range(spans[number].first, spans[number].last + 1)
                    found.extend((number, part) for part in find(run, disk, at, end, seqs))
            except (RunDamaged, FileNotFoundError) as error:
                failures += 1
                if failures > _FAILURES_MAX:
                    raise
                # A run whose file has vanished is not among the runs any more if it has become part of a larger one.
                self.discard(error)
                self.catch_up(spans)
                runs = self._runs(spans)
                continue
            yield resolve(at, end, found, spans)
            at = end

    def _runs(self, spans: Sequence[Span]) -> list[tuple[int, Run]]:
        """With the number of their span."""
        with self._lock:
            return [
                (number, run)
                for number, span in enumerate(spans)
                for run in self._generation(span).all_runs()
                if run.first <= span.last and run.last >= span.first
            ]

    def discard(self, error: RunDamaged | FileNotFoundError) -> None:
        """Drop a damaged run and all that follow it in its generation: they are built again."""
        name = error.fields["file"] if isinstance(error, RunDamaged) else Path(error.filename).name
        with self._lock:
            for generation in self._generations.values():
                index = next((i for i, run in enumerate(generation.runs) if self._shelf.is_named(run, name)), None)
                if index is not None:
                    for run in generation.runs[index:]:
                        self._shelf.drop(run)
                    del generation.runs[index:]
                    generation.clear_tail()

    def _generation(self, span: Span) -> _Generation:
        known = self._generations.get(span.generation)
        if known is None:
            runs = self._shelf.runs(span.generation)
            if runs and runs[0].first > span.first:
                # The first ones are missing: a run list has no holes.
                for run in runs:
                    self._shelf.drop(run)
                runs = []
            known = self._generations[span.generation] = _Generation(runs)
        return known

    def _add(self, generation: _Generation, entries: list[Entry]) -> None:
        if generation.last and generation.last + 1 != entries[0].header.seq:
            # What lies between was folded away before it was ever indexed.
            self._spill(generation)
        for entry in entries:
            keys, values = pack_extents(self._source.extents(entry))
            generation.tail.append((entry.header.position, keys, values))
            generation.tail_entries += len(keys)
            generation.tail_run = None
            if generation.tail_entries >= TAIL_ENTRIES_MAX or len(generation.tail) >= self._tail_segments_max:
                self._spill(generation)

    def _spill(self, generation: _Generation) -> None:
        """The tail becomes a run on disk, and small runs larger ones."""
        if not generation.tail:
            return
        generation.runs.append(self._shelf.keep(build(generation.tail)))
        generation.clear_tail()
        while (mergeable := _mergeable(generation.runs)) is not None:
            old = generation.runs[mergeable:]
            generation.runs[mergeable:] = [self._shelf.keep(merge(old))]
            for run in old:
                self._shelf.drop(run)


def _mergeable(runs: list[Run]) -> int | None:
    """Where the last ``FAN`` runs begin, if they are consecutive, of about one size, and not too large together."""
    if len(runs) < FAN:
        return None
    last = runs[-FAN:]
    sizes = [sum(run.counts) + 64 * (run.last - run.first + 1) for run in last]
    if any(a.last + 1 != b.first for a, b in itertools.pairwise(last)):
        return None
    if max(sizes) > FAN // 2 * min(sizes) or sum(sum(run.counts) for run in last) > RUN_ENTRIES_MAX:
        return None
    return len(runs) - FAN if last[-1].last - last[0].first < RUN_SEGMENTS_MAX else None


def _window(runs: list[tuple[int, Run]], disk: int, start: int, stop: int) -> int:
    """The end of a window that keeps the memory of ``resolve`` bounded: few entries or few sectors."""
    if stop - start <= _WINDOW_SECTORS_MIN:
        return stop
    if not any(count(run, disk, start, stop) for _, run in runs):
        return stop
    end = min(stop, start + _WINDOW_SECTORS_MAX)
    while end - start > _WINDOW_SECTORS_MIN:
        if sum(count(run, disk, start, end) for _, run in runs) <= _WINDOW_ENTRIES_MAX:
            break
        end = start + max(_WINDOW_SECTORS_MIN, (end - start) // 4)
    return end
