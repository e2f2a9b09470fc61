"""The operator's API for machines, tokens and the audit log. Recovery points, standbys and takeovers have their own.

Every act is audited before its answer is sent.
"""

from __future__ import annotations

import importlib.metadata
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from aiohttp import web

from cdp.server import messages as m
from cdp.server.auth import Authenticator
from cdp.server.control import Hub
from cdp.server.errors import StandbyBusy
from cdp.server.http import PRINCIPAL, Gate, answer, body_of, query_int, query_text
from cdp.server.join import Joining
from cdp.server.machines import Machines
from cdp.server.workers import Changes, Workers
from journal.errors import BadRequest
from standby.spec import check_name

if TYPE_CHECKING:
    from cdp.server.metrics import Counters
    from cdp.server.standbys import Standbys
    from cdp.store import Store

SECONDS_MAX: Final = 2**40
NS: Final = 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What the operator's API acts on."""

    store: Store
    workers: Workers
    changes: Changes
    auth: Authenticator
    joining: Joining
    hub: Hub
    machines: Machines
    standbys: Standbys
    counters: Counters


class Api:
    def __init__(self, parts: Parts, *, url: str, fingerprint: str) -> None:
        self._store = parts.store
        self._workers = parts.workers
        self._changes = parts.changes
        self._auth = parts.auth
        self._joining = parts.joining
        self._hub = parts.hub
        self._machines = parts.machines
        self._standbys = parts.standbys
        self._counters = parts.counters
        self._version = m.VersionAnswer(
            version=importlib.metadata.version("cdp-standby"), url=url, fingerprint=fingerprint
        )

    def add_routes(self, gate: Gate) -> None:
        for method, path, handler in (
            ("GET", m.VERSION, self.version),
            ("GET", m.MACHINES, self.machines),
            ("POST", m.MACHINES, self.add_machine),
            ("GET", m.MACHINE, self.machine),
            ("DELETE", m.MACHINE, self.remove_machine),
            ("POST", m.TOKENS, self.machine_token),
            ("DELETE", m.CREDENTIALS, self.revoke),
            ("GET", m.PROTECTION, self.protection),
            ("PUT", m.PROTECTION, self.protect),
            ("POST", m.STANDBY, self.standby),
            ("POST", m.OPERATOR_TOKENS, self.operator_token),
            ("GET", m.AUDIT, self.audit),
        ):
            gate.add(method, path, handler, "operator")

    async def version(self, _: web.Request) -> web.StreamResponse:
        return answer(self._version)

    # --- machines -----------------------------------------------------------------------------------------------------
    async def machines(self, _: web.Request) -> web.StreamResponse:
        return answer(await self._workers.read(self._machines.all))

    async def machine(self, request: web.Request) -> web.StreamResponse:
        return answer(await self._workers.read(self._machines.status, await self._named(request)))

    async def add_machine(self, request: web.Request) -> web.StreamResponse:
        body = await body_of(request, m.NewMachine)
        try:
            check_name(body.name)
        except ValueError as error:
            raise BadRequest(f"{error}.", remedy="Choose another name.") from None
        held = await self._workers.write(self._store.create_machine, body.name)
        await self._audit(request, "add machine", held.name)
        return answer(await self._workers.write(self._joining.issue_token, "agent", held.uuid), 201)

    async def remove_machine(self, request: web.Request) -> web.StreamResponse:
        """Credentials first, so that nothing is pushed any more; the journal last."""
        machine = await self._named(request)
        status = await self._workers.read(self._machines.status, machine)
        if status.protected and query_text(request, "force", "0") != "1":
            raise StandbyBusy(
                f"{status.name!r} is protected; removing it deletes its whole journal.",
                remedy="Say --force if that is what you want.",
            )
        if status.side == "source":
            await self._standbys.remove(machine)  # otherwise the standby is the machine now, and stays
        await self._workers.write(self._auth.forget_machine, machine)
        for slot in ("agent", "taken-over", "pe"):
            await self._hub.drop(machine, slot)
        await self._workers.write(self._machines.forget, machine)
        await self._workers.write(self._store.remove_machine, machine)
        self._hub.forget(machine)
        self._changes.forget(machine)
        self._counters.forget(machine)
        await self._audit(request, "remove machine", status.name)
        return answer({})

    async def machine_token(self, request: web.Request) -> web.StreamResponse:
        machine = await self._named(request)
        issued = await self._workers.write(self._joining.issue_token, "agent", machine)
        await self._audit(request, "issue join token", str(machine))
        return answer(issued, 201)

    async def revoke(self, request: web.Request) -> web.StreamResponse:
        machine = await self._named(request)
        ended = await self._workers.write(self._auth.revoke, machine, "agent")
        ended += await self._workers.write(self._auth.revoke, machine, "pe")
        for slot in ("agent", "taken-over", "pe"):
            await self._hub.drop(machine, slot)
        await self._audit(request, "revoke credentials", str(machine))
        return answer(m.Revoked(credentials=ended))

    async def operator_token(self, request: web.Request) -> web.StreamResponse:
        issued = await self._workers.write(self._joining.issue_token, "operator", None)
        await self._audit(request, "issue operator token", "")
        return answer(issued, 201)

    # --- protection ---------------------------------------------------------------------------------------------------
    async def protection(self, request: web.Request) -> web.StreamResponse:
        return answer(await self._workers.read(self._machines.require_spec, await self._named(request)))

    async def protect(self, request: web.Request) -> web.StreamResponse:
        machine = await self._named(request)
        body = await body_of(request, m.ProtectRequest)
        self._standbys.check_idle(machine)
        spec = await self._workers.write(self._machines.protect, machine, body)
        await self._audit(request, "protect", spec.name)
        self._changes.notify(machine)
        if spec.standby is not None and body.start_standby:
            await self._standbys.start(machine)
        return answer(await self._workers.read(self._machines.status, machine))

    async def standby(self, request: web.Request) -> web.StreamResponse:
        machine = await self._named(request)
        body = await body_of(request, m.StandbyAct)
        await self._audit(request, f"standby {body.act}", str(machine))
        match body.act:
            case "define":
                await self._standbys.define(machine)
            case "start":
                await self._standbys.start(machine)
            case "stop":
                await self._standbys.stop(machine)
            case "remove":
                await self._standbys.remove(machine)
        return answer(await self._workers.read(self._machines.status, machine))

    # --- audit --------------------------------------------------------------------------------------------------------
    async def audit(self, request: web.Request) -> web.StreamResponse:
        limit = query_int(request, "limit", 1, m.AUDIT_MAX, 100)
        entries = await self._workers.read(self._store.audit_log, limit)
        lines = [
            m.AuditLine(
                at_s=entry.at_ns / NS,
                actor=entry.actor,
                action=entry.action,
                subject=entry.subject,
                details=entry.details,
            )
            for entry in entries
        ]
        return answer(sorted(lines, key=lambda line: -line.at_s))

    async def _named(self, request: web.Request) -> uuid.UUID:
        held: Any = await self._workers.read(self._store.machine, request.match_info["name"])
        machine: uuid.UUID = held.uuid
        return machine

    async def _audit(self, request: web.Request, action: str, subject: str) -> None:
        principal = request[PRINCIPAL]
        details = {"credential": principal.credential, "from": request.remote or ""}
        await self._workers.write(self._store.audit, principal.name, action, subject, details)
