"""Recovery points by the page: the newest first are found without looking at the rest of the history."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import closing

from cdp.store.ledger import Ledger
from cdp.store.records import FuzzyInterval, RecoveryPoint
from cdp.store.state import MachineState


class ListedPoint(RecoveryPoint, frozen=True, kw_only=True):
    """``stored_bytes``: encoded segments since the recovery point before it."""

    stored_bytes: int


class Page(list[ListedPoint]):
    """Oldest first. ``fuzzy``: the intervals that touch it. ``more``: there are older points in the span."""

    fuzzy: list[FuzzyInterval]
    more: bool


class Points(Ledger):
    def points_page(self, machine: uuid.UUID, start_ns: int, end_ns: int, limit: int) -> Page:
        """The newest ``limit`` recovery points sealed in ``[start_ns, end_ns)``. Costs a page, whatever is stored."""
        state, spans, _ = self._timeline(machine)
        found = 0
        first_ns = start_ns
        more = False
        with closing(self._instants_back(state, spans, end_ns)) as instants:
            for instant in instants:
                if instant.sealed_at_ns < start_ns:
                    break
                if instant.is_recovery_point:
                    more = found == limit
                    if more:
                        break
                    found += 1
                    first_ns = instant.sealed_at_ns
        history = self.recovery_points(machine, first_ns if more else start_ns, end_ns)
        sizes = dict(self._sizes(state, first_ns, end_ns))
        page = Page(
            ListedPoint(
                position=point.position,
                sealed_at_ns=point.sealed_at_ns,
                stored_bytes=sizes.get(point.sealed_at_ns, 0),
            )
            for point in history.points
        )
        page.fuzzy, page.more = history.fuzzy, more
        return page

    def _sizes(self, state: MachineState, start_ns: int, end_ns: int) -> Iterator[tuple[int, int]]:
        """``(sealed_at_ns, stored_bytes)`` of the recovery points sealed in ``[start_ns, end_ns)``, newest first."""
        _, spans, _ = self._timeline(state.machine.uuid)
        point_ns: int | None = None
        total = 0
        with closing(self._instants_back(state, spans, end_ns)) as instants:
            for instant in instants:
                if instant.is_recovery_point:
                    if point_ns is not None:
                        yield point_ns, total
                    if instant.sealed_at_ns < start_ns:
                        return
                    point_ns, total = instant.sealed_at_ns, 0
                if point_ns is not None:
                    entry = self.entry(state, instant.generation, instant.seq)
                    total += 0 if entry is None else entry.header.segment_bytes
        if point_ns is not None:
            yield point_ns, total
