"""Takeovers as operators see them: start, watch, commit, roll back, retry. The controller does the work."""

from __future__ import annotations

import asyncio
import uuid
from typing import TYPE_CHECKING, Any, Final

import msgspec
from aiohttp import web

from cdp.server import messages as m
from cdp.server.errors import ReplicaInUse, StandbyBusy
from cdp.server.http import PRINCIPAL, Gate, answer, body_of, query_int, query_seconds
from cdp.server.machines import Machines, Side
from cdp.server.workers import Workers
from standby.takeover.controller import TakeoverController
from standby.takeover.record import Options, TakeoverRecord
from standby.takeover.states import AT_REST, Mode, State, standby_state

if TYPE_CHECKING:
    from cdp.store import Store

EXPIRY_POLL_S: Final = 30.0
WAIT_S_MAX: Final = 30.0
VERSION_MAX: Final = 2**31


class Takeovers:
    """``controller`` is set once the server is put together; it lives as long as the server."""

    def __init__(self, store: Store, workers: Workers) -> None:
        self._store = store
        self._workers = workers
        self.controller: TakeoverController | None = None
        self.machines: Machines | None = None

    # --- what the rest of the server asks; from any thread ------------------------------------------------------------
    def side_of(self, machine: uuid.UUID) -> Side:
        """Who may hold the service addresses and push."""
        return "standby" if self._controller.standby_owns(str(machine)) else "source"

    def check_replica(self, machine: uuid.UUID) -> None:
        """Raise ``ReplicaInUse`` if the standby's disks are no replica any more but the machine itself."""
        if self._controller.runs_from_standby_disks(str(machine)):
            raise ReplicaInUse(
                "The machine runs from the standby's disks since its takeover; nothing may be replayed onto them.",
                remedy="Let it boot from its disk ('virsh start cdp-NAME' on the hypervisor), or 'cdp rollback'.",
                machine=str(machine),
            )

    def newest(self, machine: uuid.UUID) -> dict[str, Any] | None:
        record = self._controller.latest(str(machine))
        return None if record is None else view(record)

    def standby_state(self, machine: uuid.UUID, reported: str | None) -> str:
        record = self._controller.latest(str(machine))
        state = None if record is None else record.state
        return standby_state(reported, state, record is not None and record.stalled is not None).value

    def check_idle(self, machine: uuid.UUID) -> None:
        """Raise ``StandbyBusy`` while a takeover is active or the standby runs the machine."""
        record = self._controller.latest(str(machine))
        if record is not None and (record.state not in AT_REST or self.side_of(machine) == "standby"):
            raise StandbyBusy(
                f"Takeover {record.id} of this machine is {record.state.value}.",
                remedy="Roll it back first, or wait until it is over; see 'cdp status'.",
                takeover=record.id,
                state=record.state.value,
            )

    async def peer_connected(self, machine: uuid.UUID) -> None:
        await self._controller.peer_connected(str(machine))

    async def watch(self) -> None:
        """Commit what has outlived its rollback window, for ever."""
        while True:
            for takeover in await self._controller.commit_expired():
                await self._workers.write(
                    self._store.audit, "server", "commit takeover", takeover, {"why": "window over"}
                )
            await asyncio.sleep(EXPIRY_POLL_S)

    # --- the API ------------------------------------------------------------------------------------------------------
    def add_routes(self, gate: Gate) -> None:
        for method, path, handler in (
            ("GET", m.MACHINE_TAKEOVERS, self.of_machine),
            ("POST", m.MACHINE_TAKEOVERS, self.start),
            ("GET", m.TAKEOVER, self.one),
            ("POST", m.COMMIT, self.commit),
            ("POST", m.ROLLBACK, self.rollback),
            ("POST", m.RETRY, self.retry),
        ):
            gate.add(method, path, handler, "operator")

    async def of_machine(self, request: web.Request) -> web.StreamResponse:
        held = await self._workers.read(self._store.machine, request.match_info["name"])
        return answer([view(record) for record in self._controller.of_machine(str(held.uuid))])

    async def start(self, request: web.Request) -> web.StreamResponse:
        assert self.machines is not None
        held = await self._workers.read(self._store.machine, request.match_info["name"])
        body = await body_of(request, m.TakeoverRequest)
        spec = await self._workers.read(self.machines.require_spec, held.uuid)
        principal = request[PRINCIPAL]
        options = Options(source_is_down=body.source_is_down, force=body.force)
        await self._audit(request, f"{body.mode} takeover", held.name)
        record = await self._controller.take_over(spec, Mode(body.mode), actor=principal.name, options=options)
        return answer(view(record), 201)

    async def one(self, request: web.Request) -> web.StreamResponse:
        """With ``after_version`` the answer waits for a newer one, for at most ``wait_s``."""
        record = self._controller.record(request.match_info["id"])
        after = query_int(request, "after_version", 0, VERSION_MAX, 0)
        wait_s = query_seconds(request, "wait_s", WAIT_S_MAX, 0.0)
        if record.version <= after and wait_s > 0:
            try:
                async with asyncio.timeout(wait_s):
                    async for changed in self._controller.changes(record.id):
                        if changed.version > after:
                            break
            except TimeoutError:
                pass
        return answer(view(record))

    async def commit(self, request: web.Request) -> web.StreamResponse:
        await self._audit(request, "commit takeover", request.match_info["id"])
        return answer(view(await self._controller.commit(request.match_info["id"])))

    async def rollback(self, request: web.Request) -> web.StreamResponse:
        await self._audit(request, "roll takeover back", request.match_info["id"])
        return answer(view(await self._controller.rollback(request.match_info["id"])))

    async def retry(self, request: web.Request) -> web.StreamResponse:
        await self._audit(request, "retry takeover", request.match_info["id"])
        return answer(view(await self._controller.retry(request.match_info["id"])))

    async def _audit(self, request: web.Request, action: str, subject: str) -> None:
        principal = request[PRINCIPAL]
        details = {"credential": principal.credential, "from": request.remote or ""}
        await self._workers.write(self._store.audit, principal.name, action, subject[:200], details)

    @property
    def _controller(self) -> TakeoverController:
        assert self.controller is not None, "set while the server is put together"
        return self.controller


def view(record: TakeoverRecord) -> dict[str, Any]:
    """A record as JSON: everything in it, and what can be computed from it."""
    shown: dict[str, Any] = msgspec.to_builtins(record)
    shown["timeline"] = msgspec.to_builtins(record.timeline())
    shown["phase_seconds"] = record.phase_seconds
    shown["downtime_s"] = record.downtime_s
    shown["settled"] = record.stalled is not None or (record.state in AT_REST and not _going_back(record))
    shown["warnings"] = record.warnings
    return shown


def _going_back(record: TakeoverRecord) -> bool:
    return record.state is State.RUNNING and record.rollback_requested


def phase_seconds(shown: dict[str, Any]) -> dict[str, float]:
    """For the metrics."""
    seconds: dict[str, float] = shown["phase_seconds"]
    return seconds
