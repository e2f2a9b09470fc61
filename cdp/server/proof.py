"""The API of everything that proves: verify, repair, compare, and an agent that knows better than the store."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Final

from aiohttp import web

from cdp.server import proof_messages as pm
from cdp.server.comparison import Comparisons
from cdp.server.errors import BodyTooLarge
from cdp.server.http import PRINCIPAL, Gate, answer, body_of, machine_id, position, send_bytes
from cdp.server.reseed import Reseeds
from cdp.server.verification import Verification
from cdp.server.workers import ByteBudget, Changes, Workers
from journal import wire
from journal.comparison import BODY_BYTES_MAX, Comparison
from journal.errors import BadRequest

if TYPE_CHECKING:
    from cdp.store import Store

COMPARISON_BYTES_MAX: Final = min(BODY_BYTES_MAX, 256 << 20)
"""Eight terabytes of disks."""


class Proof:
    def __init__(
        self,
        store: Store,
        workers: Workers,
        changes: Changes,
        budget: ByteBudget,
        *,
        verification: Verification,
        comparisons: Comparisons,
        reseeds: Reseeds,
    ) -> None:
        self._store = store
        self._workers = workers
        self._changes = changes
        self._budget = budget
        self._verification = verification
        self._comparisons = comparisons
        self._reseeds = reseeds

    def add_routes(self, gate: Gate) -> None:
        gate.add("GET", pm.VERIFY, self.verification, "operator")
        gate.add("POST", pm.VERIFY, self.verify, "operator")
        gate.add("GET", pm.COMPARE, self.comparison, "operator")
        gate.add("POST", pm.COMPARE, self.compare, "operator")
        gate.add("POST", pm.RESEED, self.reseed, "operator")
        gate.add("PUT", wire.COMPARISON, self.put_comparison, "agent")
        gate.add("GET", wire.COMPARISON, self.get_comparison, "pe")
        gate.add("POST", wire.LOST, self.lost, "agent")

    def status(self, machine: uuid.UUID) -> pm.ProofStatus:
        """From any thread."""
        verified, compared = self._verification.last(machine), self._comparisons.last(machine)
        return pm.ProofStatus(
            verified_s=None if verified is None else verified.ended_s,
            verify_success=None if verified is None else verified.success,
            damaged=0 if verified is None else verified.damaged,
            compared_s=None if compared is None else compared.ended_s,
            compare_success=None if compared is None else compared.success,
        )

    # --- verify -------------------------------------------------------------------------------------------------------
    async def verification(self, request: web.Request) -> web.StreamResponse:
        return await self._verified(await self._named(request))

    async def verify(self, request: web.Request) -> web.StreamResponse:
        machine = await self._named(request)
        body = await body_of(request, pm.VerifyRequest)
        await self._audit(request, "verify and repair" if body.repair else "verify", machine)
        self._verification.begin(machine, repair=body.repair)
        return await self._verified(machine)

    async def _verified(self, machine: uuid.UUID) -> web.StreamResponse:
        running = self._verification.running(machine)
        return answer(pm.VerifyAnswer(running=running, last=await self._workers.read(self._verification.last, machine)))

    # --- compare ------------------------------------------------------------------------------------------------------
    async def comparison(self, request: web.Request) -> web.StreamResponse:
        return await self._compared(await self._named(request))

    async def compare(self, request: web.Request) -> web.StreamResponse:
        machine = await self._named(request)
        body = await body_of(request, pm.CompareRequest)
        await self._audit(request, "compare", machine)
        self._comparisons.begin(machine, standby=body.standby)
        return await self._compared(machine)

    async def _compared(self, machine: uuid.UUID) -> web.StreamResponse:
        phase, running = self._comparisons.running(machine)
        last = await self._workers.read(self._comparisons.last, machine)
        return answer(pm.CompareAnswer(phase=phase, running=running, last=last))

    async def reseed(self, request: web.Request) -> web.StreamResponse:
        machine = await self._named(request)
        await self._audit(request, "reseed the standby", machine)
        await self._workers.write(self._reseeds.order, machine, "operator")
        self._changes.notify(machine)
        return answer({})

    async def put_comparison(self, request: web.Request) -> web.StreamResponse:
        machine, comparison = machine_id(request), request.match_info["comparison"]
        length = request.content_length
        if length is None or length > COMPARISON_BYTES_MAX:
            raise BodyTooLarge(
                f"A comparison has at most {COMPARISON_BYTES_MAX} bytes.", remedy="Its disks are too large for it."
            )
        async with self._budget.hold(length):
            raw = await request.content.read()
            try:
                Comparison.decode(raw)
            except ValueError as error:
                raise BadRequest(f"The comparison cannot be read: {error}.", remedy="Upgrade the agent.") from error
            self._comparisons.put_body(machine, comparison, raw)
        return answer({})

    async def get_comparison(self, request: web.Request) -> web.StreamResponse:
        return await send_bytes(request, self._comparisons.body(machine_id(request), request.match_info["comparison"]))

    # --- an older store -----------------------------------------------------------------------------------------------
    async def lost(self, request: web.Request) -> web.StreamResponse:
        """The agent goes on at our tip, comparing. What the standby has applied since is not ours any more: without a
        comparison it would keep blocks that were written back to what we hold."""
        machine = machine_id(request)
        acknowledged = position((await body_of(request, wire.LostBody)).acknowledged, "acknowledged")
        tip = self._store.live(machine)
        if not await self._workers.read(self._store.contains, machine, acknowledged):
            details = {"acknowledged": acknowledged.short, "tip": tip.short}
            await self._workers.write(
                self._store.audit, "agent", "acknowledged segments are missing here", str(machine), details
            )
            await self._workers.write(self._reseeds.order, machine, f"lost {acknowledged.short}")
            self._changes.notify(machine)
        return answer({})

    async def _named(self, request: web.Request) -> uuid.UUID:
        held = await self._workers.read(self._store.machine, request.match_info["name"])
        return held.uuid

    async def _audit(self, request: web.Request, action: str, machine: uuid.UUID) -> None:
        principal = request[PRINCIPAL]
        details = {"credential": principal.credential, "from": request.remote or ""}
        await self._workers.write(self._store.audit, principal.name, action, str(machine), details)
