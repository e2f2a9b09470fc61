"""Who the controller speaks with: every port, on top of a ``World``. All effects go through ``World.call``."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from journal.errors import DrainNotYet, NotInjected
from journal.position import Position
from journal.wire import AgentReport, StandbyReport
from standby.spec import MachineSpec, Probe, SourceDomain
from standby.takeover.errors import GenerationConflict
from standby.takeover.ports import Ports, Seen
from tests.takeover.world import IN_PE, Flaky, Standby, World


def ports(world: World) -> Ports:
    return Ports(
        agent=Agent(world), pe=Pe(world), store=Store(world), hypervisor=Hypervisor(world), probe=Prober(world),
        clock=world.clock,
    )  # fmt: skip


class Records:
    """``RecordStore``: the last save before a kill is the truth."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def save(self, takeover: str, raw: bytes) -> None:
        await self._world.call("save", lambda: self._world.records.__setitem__(takeover, raw))

    async def load(self) -> dict[str, bytes]:
        return dict(self._world.records)


class Agent:
    def __init__(self, world: World) -> None:
        self._world = world

    def seen(self, machine: str) -> Seen[AgentReport]:
        source = self._world.source
        there = source.alive and source.connected
        report = AgentReport(
            state="fenced" if source.fenced else "following", sealed=None, sealed_at_s=None, captured_at_s=None,
            backlog_bytes=0, backlog_segments=0, fuzzy=False,
        )  # fmt: skip
        return Seen(there, 0.5 if there else self._world.clock.monotonic_s(), report)

    def system_up(self, machine: str, takeover: str) -> bool:
        return self._world.standby.mode == "up"

    async def quiesce(self, machine: str, mode: str, lease_s: float) -> None:
        await self._world.call("quiesce", lambda: setattr(self._world.source, "quiesced", True), of="agent")

    async def thaw(self, machine: str) -> None:
        await self._world.call("thaw", lambda: setattr(self._world.source, "quiesced", False), of="agent")

    async def seal(self, machine: str) -> Position:
        position: Position = await self._world.call("seal", self._world.push, of="agent")
        return position

    async def fence(self, machine: str, generation: int, addresses: Sequence[str]) -> dict[str, Any]:
        def effect() -> dict[str, Any]:
            source = self._world.source
            assert generation == max(self._world.generations), "fenced for a generation that does not end"
            source.address = False
            self._world.push()
            source.fenced = True
            return {"removed": list(addresses), "remaining": []}

        evidence: dict[str, Any] = await self._world.call("fence", effect, of="agent")
        return evidence

    async def unfence(self, machine: str, generation: int, tip: Position, addresses: Sequence[str]) -> None:
        def effect() -> None:
            source = self._world.source
            assert generation == max(self._world.generations), "unfenced into a generation that is not live"
            source.fenced, source.address = False, True

        await self._world.call("unfence", effect, of="agent")


class Pe:
    def __init__(self, world: World) -> None:
        self._world = world

    def seen(self, machine: str) -> Seen[StandbyReport]:
        standby = self._world.standby
        there = standby.connected and standby.mode in IN_PE
        state = {"comparing": "seeding", "following": "ready"}.get(standby.mode, "taking-over")
        if standby.mode == "comparing" and self._world.replica_in_use():
            state = "failed"
        report = StandbyReport(
            state=state, applied=str(standby.applied), applied_at_s=self._world.clock.now_s(), kexec_ready=True
        )  # fmt: skip
        return Seen(there, 0.1, report, str(standby.boot))

    def _in_pe(self) -> Standby:
        if self._world.standby.mode not in IN_PE:
            raise Flaky("the PE is not there")
        return self._world.standby

    async def drain(self, machine: str, takeover: str, position: Position) -> Position:
        def effect() -> Position:
            standby = self._in_pe()
            assert standby.applied is not None
            if standby.mode == "comparing":
                raise DrainNotYet("It compares.")
            if standby.mode == "injected":
                assert standby.applied == position, "drained to another position after it was changed"
                return standby.applied
            standby.mode = "drained"
            if standby.applied < position:
                self._world.apply(position)
            return standby.applied

        applied: Position = await self._world.call("drain", effect, of="pe")
        return applied

    async def inject(self, machine: str, takeover: str, spec: MachineSpec) -> list[str]:
        def effect() -> list[str]:
            standby = self._in_pe()
            if standby.mode in ("comparing", "following"):
                raise DrainNotYet("Only drained disks can be handed over.")
            self._world.cursor = None if standby.mode == "drained" else self._world.cursor
            standby.mode, standby.injected, standby.changed = "injected", True, True
            return ["network"]

        injected: list[str] = await self._world.call("inject", effect, of="pe")
        return injected

    async def take_address(self, machine: str, takeover: str, addresses: Sequence[str], force: bool) -> list[str]:
        def effect() -> list[str]:
            self._in_pe().address = True
            return list(addresses)

        held: list[str] = await self._world.call("take_address", effect, of="pe")
        return held

    async def finish_boot(self, machine: str, takeover: str) -> None:
        def effect() -> None:
            standby = self._in_pe()
            if not standby.injected:
                raise NotInjected("Nothing was injected.")
            assert standby.mode == "injected"
            standby.mode = "booting"

        await self._world.call("finish_boot", effect, of="pe")


class Store:
    def __init__(self, world: World) -> None:
        self._world = world

    async def live(self, machine: str) -> Position:
        tip: Position = await self._world.call("live", lambda: self._world.tip)
        return tip

    async def started(self, machine: str, generation: int, parent: Position) -> bool:
        world = self._world
        found: bool = await world.call("started", lambda: world.generations.get(generation) == parent)
        return found

    async def start_generation(self, machine: str, generation: int, parent: Position, reason: str) -> Position:
        def effect() -> Position:
            world = self._world
            if world.generations.get(generation) == parent:
                return Position.genesis(uuid.UUID(machine), generation, parent)
            if generation != max(world.generations) + 1:
                raise GenerationConflict("Another generation is live.")
            world.generations[generation] = parent
            world.tip = Position.genesis(uuid.UUID(machine), generation, parent)
            world.stored[world.tip] = world.stored[parent]
            return world.tip

        genesis: Position = await self._world.call("start_generation", effect)
        return genesis

    async def last_recovery_point(self, machine: str) -> Position | None:
        position: Position = await self._world.call("last_recovery_point", self._world.recovery_point)
        return position

    async def forget_standby(self, machine: str) -> None:
        await self._world.call("forget_standby", lambda: setattr(self._world, "cursor", None))


class Hypervisor:
    def __init__(self, world: World) -> None:
        self._world = world

    async def state(self, spec: MachineSpec) -> str:
        state: str = await self._world.call("state", lambda: "off" if self._world.standby.mode == "off" else "running")
        return state

    async def redefine_for_disk(self, spec: MachineSpec) -> None:
        await self._world.call("redefine", lambda: setattr(self._world.standby, "boots_from_disk", True))

    async def destroy(self, spec: MachineSpec) -> None:
        def effect() -> None:
            standby = self._world.standby
            if standby.mode == "up":
                self._world.rolled_back_rows |= standby.rows - set(self._world.source.written)
            standby.mode, standby.address = "off", False

        await self._world.call("destroy", effect)

    async def start_pe(self, spec: MachineSpec) -> None:
        def effect() -> None:
            world, standby = self._world, self._world.standby
            if standby.mode != "off":
                return
            assert world.cursor is None or not standby.changed, "the PE takes a disk that was written to for a cursor's"
            standby.mode = "following" if world.cursor_is_good() else "comparing"
            standby.boots_from_disk, standby.compared = False, 0
            standby.boot, standby.injected = standby.boot + 1, False

        await self._world.call("start_pe", effect)

    async def destroy_source(self, source: SourceDomain) -> None:
        await self._world.call("destroy_source", lambda: setattr(self._world.source, "alive", False))


class Prober:
    def __init__(self, world: World) -> None:
        self._world = world

    async def answering(self, addresses: Sequence[str], probes: Sequence[Probe]) -> dict[str, str]:
        def effect() -> dict[str, str]:
            source = self._world.source
            return dict.fromkeys(addresses, "neighbour") if source.alive and source.address else {}

        answers: dict[str, str] = await self._world.call("answering", effect)
        return answers

    async def serving(self, address: str, probe: Probe) -> str | None:
        def effect() -> str | None:
            standby = self._world.standby
            if standby.mode == "booting":
                standby.mode, standby.address = "up", True
                standby.boot += 1
                self._world.check()
            return None if self._world.serves() else "connection refused"

        seen: str | None = await self._world.call("serving", effect)
        return seen
