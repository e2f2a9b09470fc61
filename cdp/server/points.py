"""Recovery points for operators: a page of them, and the one that belongs to a time or a bookmark."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Final

from aiohttp import web

from cdp.server import messages as m
from cdp.server.http import Gate, answer, query_int, query_text
from cdp.server.workers import Workers
from journal.errors import BadRequest
from journal.position import Position

if TYPE_CHECKING:
    from cdp.store import Store

SECONDS_MAX: Final = 2**40
NS: Final = 1_000_000_000
BOOKMARKS_MAX: Final = 10_000


class PointsApi:
    def __init__(self, store: Store, workers: Workers) -> None:
        self._store = store
        self._workers = workers

    def add_routes(self, gate: Gate) -> None:
        gate.add("GET", m.POINTS, self.points, "operator")
        gate.add("GET", m.POINT, self.point, "operator")

    async def points(self, request: web.Request) -> web.StreamResponse:
        span = _ns(request, "from", 0), _ns(request, "to", SECONDS_MAX)
        limit = query_int(request, "limit", 1, m.POINTS_MAX, m.POINTS_MAX)
        machine = await self._workers.read(self._named, request)
        return answer(await self._workers.read(self._points, machine, *span, limit))

    def _points(self, machine: uuid.UUID, start_ns: int, end_ns: int, limit: int) -> m.PointsAnswer:
        page = self._store.points_page(machine, start_ns, end_ns, limit)
        first_ns = page[0].sealed_at_ns if page.more else start_ns
        bookmarks = [one for one in self._store.bookmarks(machine) if first_ns <= one.sealed_at_ns < end_ns]
        return m.PointsAnswer(
            points=[(point.sealed_at_ns / NS, point.position, point.stored_bytes) for point in page],
            fuzzy=[m.Interval(start_s=_seconds(gap.start_ns), end_s=_seconds(gap.end_ns)) for gap in page.fuzzy],
            bookmarks=[
                m.PointBookmark(name=one.name, position=one.position, consistency=one.consistency)
                for one in bookmarks[:BOOKMARKS_MAX]
            ],
            truncated=page.more or len(bookmarks) > BOOKMARKS_MAX,
        )

    async def point(self, request: web.Request) -> web.StreamResponse:
        at = query_text(request, "at", "")
        # Times are shown to the millisecond, so the whole of the millisecond counts.
        at_ns = _parsed(at, "at") // 1_000_000 * 1_000_000 + 999_999 if at else None
        bookmark = query_text(request, "bookmark", "")
        machine = await self._workers.read(self._named, request)
        return answer(await self._workers.read(self._point, machine, at_ns, bookmark))

    def _point(self, machine: uuid.UUID, at_ns: int | None, bookmark: str) -> m.PointAnswer:
        held = self._store.machine(machine)
        found: Position | None
        if bookmark:
            found = Position.parse(self._store.bookmark(machine, bookmark).position)
        elif at_ns is None:
            found = self._store.last_recovery_point(machine)
            if found is None:
                found = self._store.position_at(machine, 2**63)  # raises, naming the nearest
        else:
            found = self._store.position_at(machine, at_ns)
        return m.PointAnswer(
            machine=str(machine),
            name=held.name,
            position=str(found),
            sealed_at_s=self._store.sealed_at_ns(machine, found) / NS,
            disks=held.disks,
        )

    def _named(self, request: web.Request) -> uuid.UUID:
        return self._store.machine(request.match_info["name"]).uuid


def _ns(request: web.Request, name: str, default_s: int) -> int:
    text = query_text(request, name, "")
    return _parsed(text, name) if text else default_s * NS


def _parsed(text: str, name: str) -> int:
    """Seconds with at most nanoseconds behind the point, exactly: floats cannot hold both."""
    whole, _, rest = text.partition(".")
    good = text.isascii() and whole.isdigit() and (not rest or rest.isdigit()) and len(whole) <= 13 and len(rest) <= 9
    if not good or int(whole) > SECONDS_MAX:
        raise BadRequest(f"The parameter {name!r} is not a time in seconds.", remedy="Correct the request.")
    return min(int(whole) * NS + int(rest.ljust(9, "0") or 0), 2**63)


def _seconds(time_ns: int | None) -> float | None:
    return None if time_ns is None else time_ns / NS
