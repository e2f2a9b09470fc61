"""What the server has already of a machine that is new to it: the agent's side of ``cdp/store/dedup.py``.

agent   POST: begin ─► PUT: may I leave these out? … ─► DELETE: that was it ─► seeds by comparing
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Final, Literal

from aiohttp import web

from cdp.server.errors import BodyTooLarge
from cdp.server.http import Gate, answer, machine_id, query_int, query_text
from cdp.server.workers import ByteBudget, Workers
from cdp.store.base import BATCH_CHUNKS
from cdp.store.dedup import Dedup, Wanted
from journal import proof, wire
from journal.errors import BadRequest, PrefillClosed
from journal.extent import DISKS_MAX

if TYPE_CHECKING:
    from cdp.server.metrics import Counters
    from cdp.store import Store

_HELD_BYTES: Final = 2 * BATCH_CHUNKS * proof.CHUNK_BYTES
"""One batch as it was found, and once more as it is laid."""
_BODY_BYTES_MAX: Final = proof.ENTRIES_MAX * proof.ENTRY_BYTES


class Prefills:
    """``dedup`` None: switched off."""

    def __init__(
        self, store: Store, workers: Workers, budget: ByteBudget, counters: Counters, dedup: Dedup | None
    ) -> None:
        self._store = store
        self._workers = workers
        self._budget = budget
        self._counters = counters
        self.dedup = dedup

    def add_routes(self, gate: Gate) -> None:
        gate.add("POST", wire.PREFILL, self.begin, "agent")
        gate.add("PUT", wire.PREFILL, self.lay, "agent")
        gate.add("DELETE", wire.PREFILL, self.end, "agent")

    async def begin(self, request: web.Request) -> web.StreamResponse:
        machine = machine_id(request)
        self._enabled(machine)
        return answer(wire.PrefillBegun(key=await self._workers.write(self._store.begin_prefill, machine)))

    async def lay(self, request: web.Request) -> web.StreamResponse:
        machine, dedup = machine_id(request), self._enabled(machine_id(request))
        key, disk = query_text(request, "key"), query_int(request, "disk", 0, DISKS_MAX - 1)
        try:
            wanted = [Wanted(*one) for one in proof.entries(await _body(request))]
            if len(bytes.fromhex(key)) != proof.KEY_BYTES:
                raise ValueError("the key is not one of ours")
        except ValueError as error:
            raise BadRequest(f"This is no list of chunks: {error}.", remedy="Upgrade the agent.") from None
        self._check_on_disk(machine, disk, wanted)
        async with self._budget.hold(_HELD_BYTES):
            chunks = await self._workers.read(dedup.fill, machine, key, disk, wanted)
        self._counters.deduplicated(machine, chunks * proof.CHUNK_BYTES)
        return answer(wire.PrefillLaid(chunks=chunks))

    async def end(self, request: web.Request) -> web.StreamResponse:
        machine = machine_id(request)
        row = await self._workers.write(self._store.end_prefill, machine)
        return answer(wire.PrefillEnded(prefill="filled" if row.state == "filled" else "none"))

    def state_of(self, machine: uuid.UUID) -> Literal["open", "none", "filled"]:
        """For ``wire.MachineState``. It is not worth asking while there are no hints of any machine."""
        row = self._store.prefill(machine)
        if row is not None and row.state != "filling":
            return row.state
        possible = self.dedup is not None and (row is not None or bool(self.dedup.index))
        return "open" if possible and self._store.may_prefill(machine) else "none"

    def _enabled(self, machine: uuid.UUID) -> Dedup:
        if self.dedup is None:
            raise PrefillClosed(
                "This server does not look for what it has already.",
                remedy="The agent sends everything; see 'dedup.enabled' in the server's configuration.",
                machine=str(machine),
            )
        return self.dedup

    def _check_on_disk(self, machine: uuid.UUID, disk: int, wanted: list[Wanted]) -> None:
        held = self._store.machine(machine).disk(disk)
        end = (wanted[-1].number + 1) * proof.CHUNK_BYTES if wanted else 0
        if held is None or end > held.size_bytes:
            raise BadRequest(
                f"Byte {end} of disk {disk} is not on the machine's disks.",
                remedy="Restart the agent: it reports them.",
            )


async def _body(request: web.Request) -> bytes:
    raw = bytearray()
    async for chunk in request.content.iter_any():
        raw += chunk
        if len(raw) > _BODY_BYTES_MAX:
            raise BodyTooLarge(
                f"A list of chunks has at most {_BODY_BYTES_MAX} bytes.", remedy="The agent is broken: upgrade it."
            )
    return bytes(raw)
