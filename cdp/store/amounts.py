"""How much is stored, since when, and how fast it grows: cheap enough for every look at a machine's status."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import closing
from typing import Final

from cdp.store import tally
from cdp.store.history import Reading, behind
from cdp.store.machines import unknown_position
from cdp.store.records import Entry, Instant, Span, Usage
from cdp.store.state import MachineState
from cdp.store.tally import Tally
from journal.position import Position

RECENT_NS: Final = 86_400 * 10**9
"""What "today's rate" is measured over."""


class Amounts(Reading):
    def backlog_bytes(self, machine: uuid.UUID, position: Position) -> tuple[int, int]:
        """Segments and their encoded bytes that are stored after ``position`` on the live lineage."""
        state = self.state(machine)
        with state.lock:
            spans = state.held(state.lineage())
            if not self._on(state, spans, position):
                raise unknown_position(machine, position)
            pending = list(state.pending.values())
        total = self._within(state, behind(spans, position), pending)
        return total.segments, total.segment_bytes

    def usage(self, machine: uuid.UUID) -> Usage:
        """Reads some hundred rows, however long the journal is."""
        state, spans, base = self._timeline(machine)
        pending = self._pending(state)
        with self.index.read() as txn:
            total = tally.everything(txn, machine)
            total += tally.tally_of(e for e in pending if not _is_indexed(txn.segment, machine, e))
        with closing(self._instants(state, spans, 0)) as instants:
            first = next(instants, None)
        with closing(self._instants_back(state, spans, 2**64 - 1)) as instants:
            last = next(instants, None)
        oldest_ns = base[1] if base is not None else first.sealed_at_ns if first is not None else None
        newest_ns = last.sealed_at_ns if last is not None else oldest_ns
        point_ns = base[1] if base is not None else self._first_point_ns(state, spans)
        recent_bytes, recent_ns = self._recent(state, spans, point_ns, newest_ns)
        return Usage(
            segments=total.segments,
            segment_bytes=total.record_bytes,
            file_bytes=self.pool.bytes_of(machine),
            oldest_ns=oldest_ns,
            newest_ns=newest_ns,
            recoverable_from_ns=point_ns,
            recent_bytes=recent_bytes,
            recent_ns=recent_ns,
        )

    def _recent(
        self, state: MachineState, spans: list[Span], point_ns: int | None, newest_ns: int | None
    ) -> tuple[int, int]:
        """Bytes of records, and the time in which they came. The first seed is left out: it comes once."""
        if point_ns is None or newest_ns is None:
            return 0, 0
        since_ns = max(point_ns, newest_ns - RECENT_NS)
        with closing(self._instants(state, spans, since_ns + 1)) as instants:
            first: Instant | None = next(instants, None)
        if first is None:
            return 0, 0
        number = next(n for n, span in enumerate(spans) if span.generation == first.generation)
        later = [Span(first.generation, first.seq, spans[number].last), *spans[number + 1 :]]
        return self._within(state, later, self._pending(state)).record_bytes, newest_ns - since_ns

    def _within(self, state: MachineState, spans: list[Span], pending: list[Entry]) -> Tally:
        """``pending`` was listed before: by now some of it may be in the index."""
        machine = state.machine.uuid
        waiting = [
            entry
            for entry in pending
            if any(s.generation == entry.header.generation and s.first <= entry.header.seq <= s.last for s in spans)
        ]
        with self.index.read() as txn:
            total = tally.tally_of(e for e in waiting if not _is_indexed(txn.segment, machine, e))
            return sum((tally.within(txn, machine, span) for span in spans), total)

    def _first_point_ns(self, state: MachineState, spans: list[Span]) -> int | None:
        """The oldest recovery point; found once, for until something is folded it stays the oldest."""
        if state.first_point_ns is None and state.recovery_point is not None:
            with closing(self._instants(state, spans, 0)) as instants:
                state.first_point_ns = next((i.sealed_at_ns for i in instants if i.is_recovery_point), None)
        return state.first_point_ns


def _is_indexed(lookup: Callable[[uuid.UUID, int, int], Entry | None], machine: uuid.UUID, entry: Entry) -> bool:
    return lookup(machine, entry.header.generation, entry.header.seq) is not None
