"""Bookmarks: names for recovery points, given by operators and by the machines themselves.

    of now     name free? ─► agent: hold still (application), cut, store ─► name the very position that it answers
    of then    name free? ─► the newest recovery point up to that time ─► name it

A bookmark is there when the answer is, and names what is stored already; whatever fails in between leaves none. A
machine may name its present. What costs others something (to hold retention) or looks at the past is an operator's.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from aiohttp import web

from cdp.server import messages as m
from cdp.server.errors import BookmarksFull, UnexpectedFrame
from cdp.server.http import PRINCIPAL, Gate, answer, body_of, machine_id
from cdp.server.workers import Workers
from cdp.store.errors import BookmarkExists, UnknownBookmark
from cdp.store.ledger import NAME_BYTES_MAX
from journal import wire
from journal.errors import BadRequest, Forbidden
from journal.position import Position

if TYPE_CHECKING:
    from cdp.server.control import Hub
    from cdp.server.machines import Machines
    from cdp.store import Bookmark, Store

BOOKMARKS_MAX: Final = 1000
"""Of each machine, expired ones left out: one an hour for six weeks."""
NS: Final = 1_000_000_000
AT_S_MAX: Final = 2**33


class Bookmarks:
    """``check_idle`` raises ``StandbyBusy`` if the machine's present is a takeover's."""

    def __init__(
        self,
        store: Store,
        workers: Workers,
        hub: Hub,
        machines: Machines,
        check_idle: Callable[[uuid.UUID], None],
    ) -> None:
        self._store = store
        self._workers = workers
        self._hub = hub
        self._machines = machines
        self._check_idle = check_idle

    def add_routes(self, gate: Gate) -> None:
        gate.add("GET", m.BOOKMARKS, self.all, "operator")
        gate.add("POST", m.BOOKMARKS, self.add, "operator")
        gate.add("PATCH", m.BOOKMARK, self.hold, "operator")
        gate.add("DELETE", m.BOOKMARK, self.remove, "operator")
        gate.add("POST", wire.BOOKMARKS, self.add_own, "agent")

    # --- the API ------------------------------------------------------------------------------------------------------
    async def all(self, request: web.Request) -> web.StreamResponse:
        rows = await self._workers.read(self._store.bookmarks, await self._named(request))
        return answer([_info(row) for row in sorted(rows, key=lambda row: (row.sealed_at_ns, row.name))])

    async def add(self, request: web.Request) -> web.StreamResponse:
        body = await body_of(request, wire.BookmarkRequest)
        return await self._add(request, await self._named(request), body)

    async def add_own(self, request: web.Request) -> web.StreamResponse:
        body = await body_of(request, wire.BookmarkRequest)
        if body.hold or body.at_s is not None:
            raise Forbidden(
                "A machine may bookmark its present, and may not hold retention.",
                remedy="Let an operator do that: 'cdp bookmark add --hold', or --at.",
            )
        return await self._add(request, machine_id(request), body)

    async def hold(self, request: web.Request) -> web.StreamResponse:
        machine, name = await self._named(request), request.match_info["id"]
        body = await body_of(request, m.BookmarkHold)
        _check_name(name)
        row = await self._workers.write(self._store.hold_bookmark, machine, name, body.hold)
        await self._audit(request, "hold bookmark" if body.hold else "release bookmark", machine, {"bookmark": name})
        return answer(_info(row))

    async def remove(self, request: web.Request) -> web.StreamResponse:
        machine, name = await self._named(request), request.match_info["id"]
        _check_name(name)
        await self._workers.write(self._store.remove_bookmark, machine, name)
        await self._audit(request, "remove bookmark", machine, {"bookmark": name})
        return answer({})

    # --- adding -------------------------------------------------------------------------------------------------------
    async def _add(self, request: web.Request, machine: uuid.UUID, body: wire.BookmarkRequest) -> web.StreamResponse:
        _check(body)
        # Before the machine is held up for a name that cannot be given.
        await self._workers.read(self._check_free, machine, body.name)
        if body.at_s is None:
            position, hooks = await self._now(machine, body)
        else:
            # Times are shown to the millisecond, so the whole of the millisecond counts.
            at_ns = int(body.at_s * 1000) * (NS // 1000) + NS // 1000 - 1
            position, hooks = await self._workers.read(self._store.position_at, machine, at_ns), ""
        row = await self._workers.write(
            self._store.add_bookmark,
            machine,
            body.name,
            position,
            body.note,
            hold=body.hold,
            consistency="application" if body.application else "crash",
            hooks=hooks,
        )
        told = {"bookmark": row.name, "position": row.position, "consistency": row.consistency}
        await self._audit(request, "add bookmark", machine, told)
        return answer(_info(row), 201)

    async def _now(self, machine: uuid.UUID, body: wire.BookmarkRequest) -> tuple[Position, str]:
        await self._workers.read(self._machines.require_spec, machine)
        self._check_idle(machine)
        args = {"label": body.name, "application": body.application}
        made = await self._hub.call(machine, "agent", "bookmark", args, body.wait_s)
        try:
            return Position.parse(str(made.get("position"))), str(made.get("hooks", ""))
        except ValueError:
            raise UnexpectedFrame("The agent's answer names no position.", remedy="Upgrade the older side.") from None

    def _check_free(self, machine: uuid.UUID, name: str) -> None:
        live = [row.name for row in self._store.bookmarks(machine) if row.expired_at_ns is None]
        if name in live:
            raise BookmarkExists(
                f"There is a bookmark {name!r} already.", remedy="Choose another name, or remove it first.", name=name
            )
        if len(live) >= BOOKMARKS_MAX:
            raise BookmarksFull(
                f"The machine has {len(live)} bookmarks, which is the limit.",
                remedy="Remove some: 'cdp bookmark list' and 'cdp bookmark remove'.",
                bookmarks_max=BOOKMARKS_MAX,
            )

    async def _named(self, request: web.Request) -> uuid.UUID:
        return (await self._workers.read(self._store.machine, request.match_info["name"])).uuid

    async def _audit(self, request: web.Request, action: str, machine: uuid.UUID, details: dict[str, str]) -> None:
        principal = request[PRINCIPAL]
        details = {**details, "credential": principal.credential, "from": request.remote or ""}
        await self._workers.write(self._store.audit, principal.name, action, str(machine), details)


def _check(body: wire.BookmarkRequest) -> None:
    note_max, wait_max = wire.BOOKMARK_NOTE_CHARS_MAX, wire.BOOKMARK_WAIT_S_MAX
    for wrong, what in (
        (not _is_name(body.name), f"its name has 1 to {NAME_BYTES_MAX} printable bytes and no slash"),
        (len(body.note) > note_max, f"a note has at most {note_max} characters"),
        (body.at_s is not None and not 0 <= body.at_s < AT_S_MAX, "that is no time in seconds"),
        (body.at_s is not None and body.application, "the past cannot be made application-consistent"),
        (not 0 < body.wait_s <= wait_max, f"it can be waited for up to {wait_max:.0f} s"),
    ):
        if wrong:
            raise BadRequest(f"The bookmark cannot be made: {what}.", remedy="Correct the request.")


def _check_name(name: str) -> None:
    if not _is_name(name):
        raise UnknownBookmark(f"There is no bookmark {name!r}.", remedy="See 'cdp bookmark list'.", name=name)


def _is_name(name: str) -> bool:
    """Slashes would end the path that names it."""
    return 1 <= len(name.encode()) <= NAME_BYTES_MAX and name.isprintable() and "/" not in name


def _info(row: Bookmark) -> wire.BookmarkInfo:
    return wire.BookmarkInfo(
        name=row.name,
        position=row.position,
        sealed_at_s=row.sealed_at_ns / NS,
        created_at_s=row.created_at_ns / NS,
        note=row.note,
        consistency=row.consistency,
        hold=row.hold,
        hooks=row.hooks,
        expired_at_s=None if row.expired_at_ns is None else row.expired_at_ns / NS,
    )
