"""Reading what is stored: the feed, recovery points by time, and single segments."""

from __future__ import annotations

import heapq
import itertools
import uuid
from collections.abc import Generator, Iterator
from contextlib import closing

from cdp.store.errors import PositionFolded, StoredDamage, StoreFailed
from cdp.store.ingest import Ingest
from cdp.store.machines import unknown_position
from cdp.store.record import read_segment
from cdp.store.records import (
    Entry,
    FuzzyInterval,
    History,
    Instant,
    RecoveryPoint,
    Span,
    generation_key,
    segment_key,
    time_bound,
    time_key,
)
from cdp.store.state import MachineState
from journal.errors import NoRecoveryPoint
from journal.position import Position
from journal.segment import Flags, Header


class Reading(Ingest):
    def contains(self, machine: uuid.UUID, position: Position) -> bool:
        """Is it on the live lineage and not folded away? A consumer that stands there can follow the feed."""
        state = self.state(machine)
        with state.lock:
            return self._on(state, state.held(state.lineage()), position)

    def header(self, machine: uuid.UUID, position: Position) -> Header:
        """Of any stored segment, whatever its branch. Raises ``UnknownPosition``."""
        return self._entry_at(self.state(machine), position).header

    def headers_after(self, machine: uuid.UUID, position: Position, limit: int) -> list[Header]:
        """At most ``limit`` headers that follow ``position`` on the live lineage, without a gap.

        Raises ``UnknownPosition`` if ``position`` is not on it: the consumer has to seed again.
        """
        state = self.state(machine)
        with state.lock:
            spans = state.held(state.lineage())
            if not self._on(state, spans, position):
                raise unknown_position(machine, position)
            pending = list(state.pending.values())
        with closing(self._entries(state, behind(spans, position), pending)) as entries:
            return [entry.header for entry in itertools.islice(entries, limit)]

    def read_segment(self, machine: uuid.UUID, position: Position) -> bytes:
        """The encoded segment, every digest checked. Raises ``UnknownPosition`` and ``StoredDamage``."""
        state = self.state(machine)
        entry = self._entry_at(state, position)
        file = self.pool.row(entry.file)
        try:
            if file is None:
                raise unknown_position(machine, position)
            return bytes(read_segment(self.files, self.pool.path(entry.file), file, entry).raw)
        except (StoredDamage, OSError) as error:
            # Retention may have recycled the file between the two reads; otherwise it is damage.
            self._entry_at(state, position)
            if isinstance(error, OSError):
                raise StoreFailed(f"A segment cannot be read: {error}.", remedy="Check the store's disk.") from error
            raise

    def last_recovery_point(self, machine: uuid.UUID) -> Position | None:
        """The newest one of the live lineage."""
        state = self.state(machine)
        with state.lock:
            return state.recovery_point

    def is_recovery_point(self, machine: uuid.UUID, position: Position) -> bool:
        """Raises ``UnknownPosition`` if it is not stored."""
        state = self.state(machine)
        if state.is_base(position):
            return True
        if position.is_genesis:
            if not self.is_stored(state, position):
                raise unknown_position(machine, position)
            parent = state.generations[position.generation].parent_position
            return parent is None or self.is_recovery_point(machine, parent)
        return self._entry_at(state, position).header.is_recovery_point

    def recovery_points(self, machine: uuid.UUID, start_ns: int, end_ns: int) -> History:
        """Recovery points sealed in ``[start_ns, end_ns)`` and the fuzzy intervals that touch it, oldest first."""
        state, spans, base = self._timeline(machine)
        before = next(
            (i.sealed_at_ns for i in self._instants_back(state, spans, start_ns) if i.is_recovery_point), None
        )
        points: list[RecoveryPoint] = []
        if base is not None and base[1] < end_ns:
            # The base image is the oldest point: nothing before it is fuzzy.
            before = base[1] if before is None else before
            if base[1] >= start_ns:
                points.append(RecoveryPoint(position=str(base[0]), sealed_at_ns=base[1]))
        with closing(self._instants(state, spans, start_ns if before is None else before + 1)) as instants:
            found, fuzzy = _told_apart(instants, before, start_ns, end_ns)
        for instant in found:
            entry = self.entry(state, instant.generation, instant.seq)
            # None: retention has folded it since it was listed.
            if entry is not None:
                points.append(RecoveryPoint(position=str(entry.header.position), sealed_at_ns=instant.sealed_at_ns))
        return History(points=points, fuzzy=fuzzy)

    def position_at(self, machine: uuid.UUID, time_ns: int) -> Position:
        """The newest recovery point sealed at or before ``time_ns``.

        Raises ``NoRecoveryPoint`` if there is none or if ``time_ns`` lies in a fuzzy interval; its fields
        ``before_ns`` and ``after_ns`` name the nearest ones (None: there is none).
        """
        state, spans, base = self._timeline(machine)
        fuzzy = False
        before: Instant | None = None
        with closing(self._instants_back(state, spans, time_ns + 1)) as instants:
            for instant in instants:
                if instant.is_recovery_point:
                    before = instant
                    break
                fuzzy = fuzzy or Flags.FUZZY in instant.flags
        if not fuzzy and before is not None:
            entry = self.entry(state, before.generation, before.seq)
            # If retention has folded it since it was found, the base image has taken its place.
            return entry.header.position if entry is not None else self.position_at(machine, time_ns)
        if not fuzzy and base is not None and base[1] <= time_ns:
            return base[0]
        before_ns = None if before is None else before.sealed_at_ns
        if before is None and base is not None and base[1] <= time_ns:
            before_ns = base[1]
        with closing(self._instants(state, spans, time_ns + 1)) as instants:
            after_ns = next((instant.sealed_at_ns for instant in instants if instant.is_recovery_point), None)
        if base is not None and base[1] > time_ns:
            after_ns = base[1]
        raise NoRecoveryPoint(
            "At that time the stored history is fuzzy: a seed or resync had not caught up."
            if fuzzy
            else "Nothing is stored for a time so early.",
            remedy="Choose one of the nearest recovery points; 'cdp points' lists them.",
            machine=str(machine),
            fuzzy=fuzzy,
            before_ns=before_ns,
            after_ns=after_ns,
        )

    def _on(self, state: MachineState, spans: list[Span], position: Position) -> bool:
        return any(position in span for span in spans) and self.is_stored(state, position)

    def _entry_at(self, state: MachineState, position: Position) -> Entry:
        entry = self.entry(state, position.generation, position.seq)
        if entry is not None and entry.header.position == position:
            return entry
        base = state.base
        if base is not None and position <= base.target_position:
            raise PositionFolded(
                f"Position {position.short} is older than the oldest recovery point, {base.target_position.short}.",
                remedy="Choose a later one; a longer retention keeps more.",
                position=str(position),
            )
        raise unknown_position(state.machine.uuid, position)

    def _pending(self, state: MachineState) -> list[Entry]:
        with state.lock:
            return list(state.pending.values())

    def newest_entry(self, state: MachineState, generation: int) -> Entry | None:
        """The last stored segment of a generation."""
        if generation == state.tip.generation and (pending := self._pending(state)):
            return pending[-1]
        prefix = generation_key(state.machine.uuid, generation)
        with self.index.read() as txn, closing(txn.scan_back("segments", prefix + b"\xff" * 9, prefix)) as rows:
            return next((Entry.unpack(value) for _, value in rows), None)

    def entries(self, state: MachineState, span: Span, limit: int) -> list[Entry]:
        """At most ``limit`` stored segments of ``span``, in order."""
        with closing(self._entries(state, [span], self._pending(state))) as entries:
            return list(itertools.islice(entries, limit))

    def _entries(self, state: MachineState, spans: list[Span], pending: list[Entry]) -> Generator[Entry, None, None]:
        """The entries of ``spans`` in order. ``pending`` was taken before: by now it may be in the index as well."""
        machine = state.machine.uuid
        with self.index.read() as txn:
            for span in spans:
                seq = span.first
                start, prefix = segment_key(machine, span.generation, seq), machine.bytes
                for _, value in txn.scan("segments", start, prefix):
                    entry = Entry.unpack(value)
                    if entry.header.generation != span.generation or entry.header.seq > span.last:
                        break
                    yield entry
                    seq = entry.header.seq + 1
                for entry in pending:
                    if entry.header.generation == span.generation and seq <= entry.header.seq <= span.last:
                        yield entry

    def _timeline(self, machine: uuid.UUID) -> tuple[MachineState, list[Span], tuple[Position, int] | None]:
        """What can be recovered, dead branches left out: spans, and the base image if it is one of the points."""
        state = self.state(machine)
        with state.lock:
            whole = state.timeline()
            base = state.base
        if base is None or not any(base.target_position in span for span in whole):
            return state, state.held(whole), None
        return state, state.held(whole), (base.target_position, base.sealed_at_ns)

    def _instants(self, state: MachineState, spans: list[Span], start_ns: int) -> Generator[Instant, None, None]:
        """Rows of ``times`` in ``spans``, sealed at or after ``start_ns``, ascending."""
        pending = self._pending_times(state)
        machine = state.machine.uuid
        with self.index.read() as txn:
            rows = dict(pending)
            known = txn.scan("times", time_bound(machine, start_ns), machine.bytes)
            waiting = sorted(key for key in rows if key >= time_bound(machine, start_ns))
            yield from _merged(known, [(key, rows[key]) for key in waiting], spans)

    def _instants_back(self, state: MachineState, spans: list[Span], before_ns: int) -> Generator[Instant, None, None]:
        """Rows of ``times`` in ``spans``, sealed before ``before_ns``, descending."""
        rows = self._pending_times(state)
        machine = state.machine.uuid
        with self.index.read() as txn:
            bound = time_bound(machine, before_ns)
            known = txn.scan_back("times", bound, machine.bytes)
            waiting = sorted((key for key in rows if key < bound), reverse=True)
            yield from _merged(known, [(key, rows[key]) for key in waiting], spans, descending=True)

    def _pending_times(self, state: MachineState) -> dict[bytes, bytes]:
        machine = state.machine.uuid
        return {time_key(machine, entry.header): bytes([entry.header.flags]) for entry in self._pending(state)}


def _told_apart(
    instants: Iterator[Instant], before_ns: int | None, start_ns: int, end_ns: int
) -> tuple[list[Instant], list[FuzzyInterval]]:
    """The recovery points sealed in ``[start_ns, end_ns)`` and the fuzzy intervals that touch it, of ``instants`` that
    begin right after the recovery point at ``before_ns``."""
    points: list[Instant] = []
    fuzzy: list[FuzzyInterval] = []
    is_open = False
    for instant in instants:
        if instant.sealed_at_ns >= end_ns and not is_open:
            return points, fuzzy
        if not instant.is_recovery_point:
            is_open = is_open or Flags.FUZZY in instant.flags
            continue
        if is_open and instant.sealed_at_ns > start_ns:
            fuzzy.append(FuzzyInterval(start_ns=before_ns, end_ns=instant.sealed_at_ns))
        is_open, before_ns = False, instant.sealed_at_ns
        if start_ns <= instant.sealed_at_ns < end_ns:
            points.append(instant)
    if is_open:
        fuzzy.append(FuzzyInterval(start_ns=before_ns, end_ns=None))
    return points, fuzzy


def behind(spans: list[Span], position: Position) -> list[Span]:
    """The part of a lineage that follows ``position``, which lies on it."""
    for number, span in reversed(list(enumerate(spans))):
        if position in span:
            return [Span(span.generation, max(span.first, position.seq + 1), span.last), *spans[number + 1 :]]
    raise AssertionError(f"{position.short} is not on the lineage")


def _merged(
    known: Iterator[tuple[bytes, bytes]],
    waiting: list[tuple[bytes, bytes]],
    spans: list[Span],
    *,
    descending: bool = False,
) -> Iterator[Instant]:
    """Two sorted runs of rows as one, each row once, those outside of ``spans`` left out."""
    last = b""
    for key, value in heapq.merge(known, waiting, key=lambda row: row[0], reverse=descending):
        if key != last:
            last = key
            instant = Instant.unpack(key, value)
            if any(s.generation == instant.generation and s.first <= instant.seq <= s.last for s in spans):
                yield instant
