"""A world of one source, one standby, a store and a client, which can be broken at every call.

It is the other side of every port. The client writes one numbered row per millisecond to whoever holds the service
address and serves, and remembers what was acknowledged. ``check`` is called after every effect.

    fault           where                  what
    kill            before/after an effect the controller dies: it never gets an answer, and stores nothing more
    error           before/after           a permanent error, or an answer that is lost for good
    flaky           before/after           a transient error: the connection was lost
    hang            before/after           no answer until the deadline
    restart-pe      before/after           the PE's process ends; its kernel keeps the addresses
    reset-pe        before/after           the standby's domain is reset
    die             before/after           the source is gone
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from blake3 import blake3

from journal.errors import CdpError, DrainNotYet, NotInjected
from journal.position import Position
from journal.wire import AgentReport, StandbyReport
from standby.spec import Deadlines, MachineSpec, Probe, SourceDomain, StandbySpec
from standby.takeover.errors import GenerationConflict
from standby.takeover.ports import Ports, Seen
from standby.takeover.record import TakeoverRecord
from standby.takeover.states import Act
from tests.takeover.virtual_time import VirtualClock

MACHINE = "6a1d9cf2-1d0c-4c27-9f4b-3a8f5a6b7c8d"
ADDRESS = "10.0.0.100/24"


class Broken(CdpError):
    code = "broken"


class Flaky(CdpError):
    code = "flaky"
    transient = True


def spec(**changes: Any) -> MachineSpec:
    values: dict[str, Any] = {
        "machine": MACHINE,
        "name": "db1",
        "service_addresses": (ADDRESS,),
        "probes": (Probe(kind="tcp", port=5432),),
        "quiesce": "postgresql",
        "standby": StandbySpec(hypervisor="test:///", bridge="br0", management_address="10.0.0.20/24"),
        "deadlines": Deadlines(check=5, quiesce=10, seal=5, fence=5, drain=10, inject=10, ip_drift=5, finish_boot=5,
                               probe=20),
        "silence_s": 4.0,
    }  # fmt: skip
    return MachineSpec(**(values | changes))


@dataclass
class Source:
    alive: bool = True
    connected: bool = True
    address: bool = True
    quiesced: bool = False
    fenced: bool = False
    written: set[int] = field(default_factory=set)
    """Rows on its disk."""


@dataclass
class Standby:
    """``mode``: comparing, following, drained, injected, booting, up, off. ``torn``: the disks are at no position, as a
    comparison that has begun leaves them. ``boot``: which run of its kernel; ``pe_since_s`` of its process."""

    mode: str = "following"
    connected: bool = True
    address: bool = False
    rows: set[int] = field(default_factory=set)
    applied: Position | None = None
    boots_from_disk: bool = False
    injected: bool = False
    """In the memory of the PE's process."""
    torn: bool = False
    changed: bool = False
    """By the injection or by the system that ran: no cursor may vouch for the disks."""
    compared: int = 0
    boot: int = 1


IN_PE = ("comparing", "following", "drained", "injected")
COMPARISON_TICKS = 8

Fault = tuple[str, str]
"""``(kind, "before" | "after")``"""


class World:
    """``faults``: called with (port call, n-th call in all), gives a Fault or None."""

    def __init__(self, faults: Callable[[str, int], Fault | None] = lambda call, number: None, **changes: Any) -> None:
        self.spec = spec(**changes)
        self.clock = VirtualClock()
        self.faults = faults
        self.calls: list[str] = []
        self.violations: list[str] = []
        self.killed = asyncio.Event()
        self.source = Source()
        self.standby = Standby()
        self.acked: set[int] = set()
        self.row = 0
        self.forced = False
        self.rolled_back_rows: set[int] = set()
        self.force_domain_on = False
        first = Position.genesis(uuid.UUID(MACHINE), 1, None)
        self.generations: dict[int, Position | None] = {1: None}
        self.tip = first
        self.stored: dict[Position, frozenset[int]] = {first: frozenset()}
        self.cursor: Position | None = first
        self.records: dict[str, bytes] = {}
        self.push()
        self.follow()

    # --- the world goes on by itself --------------------------------------------------------------------------------
    def tick(self) -> None:
        """A row is committed somewhere, and a segment travels, if they can."""
        self.row += 1
        source, standby = self.source, self.standby
        if source.alive and source.address and not source.quiesced:
            source.written.add(self.row)
            self.acked.add(self.row)
        elif standby.mode == "up" and standby.address:
            standby.rows.add(self.row)
            self.acked.add(self.row)
        if self.row % 3 == 0:
            self.push()
            self.compare()
            self.follow()

    def push(self) -> Position:
        """The source seals everything that is on its disk and the store takes it, if it may."""
        live = max(self.generations)
        if self.source.alive and not self.source.fenced and self.tip.generation == live:
            digest = blake3(self.tip.digest + bytes(str(sorted(self.source.written)), "ascii")).digest()
            self.tip = Position(live, self.tip.seq + 1, digest)
            self.stored[self.tip] = frozenset(self.source.written)
        return self.tip

    def compare(self) -> None:
        """Of a PE that was restarted on disks without a cursor; the server gives it nothing if they may be in use."""
        standby = self.standby
        if standby.mode == "comparing" and not self.replica_in_use():
            standby.torn, standby.compared = True, standby.compared + 3
            if standby.compared >= COMPARISON_TICKS:
                standby.mode, standby.torn, standby.changed = "following", False, False

    def cursor_is_good(self) -> bool:
        return self.cursor is not None and self.cursor.generation == max(self.generations)

    def replica_in_use(self) -> bool:
        """As the server decides it, by what is stored."""
        for raw in reversed(self.records.values()):
            record = TakeoverRecord.decode(raw)
            if record.stands(Act.FINISH_BOOT):
                return not record.done(Act.STOP_STANDBY)
        return False

    def follow(self) -> None:
        if self.standby.mode == "following":
            self.apply(self.recovery_point())

    def recovery_point(self) -> Position:
        """The last one; a genesis is none, but what it stands on."""
        parent = self.generations[self.tip.generation]
        return parent if self.tip.is_genesis and parent is not None else self.tip

    def apply(self, position: Position) -> None:
        self.standby.applied = self.cursor = position
        self.standby.rows = set(self.stored[position])

    def check(self) -> None:
        """The invariants that hold at every instant."""
        source_holds = self.source.alive and self.source.address
        assert not (source_holds and self.standby.address), "two sides hold the service address"
        assert self.forced or not (self.source.fenced and self.source.address), "a fenced source holds the address"
        assert not (self.standby.torn and self.standby.mode in ("booting", "up")), "booted from torn disks"
        assert set(self.generations) == set(range(1, max(self.generations) + 1)), "a gap between generations"
        if self.standby.mode in ("injected", "booting", "up"):
            assert len(self.generations) > 1, "the standby was changed without a generation of its own"

    def serves(self) -> str | None:
        if self.source.alive and self.source.address and not self.source.quiesced:
            return "source"
        return "standby" if self.standby.mode == "up" and self.standby.address else None

    def restart(self) -> None:
        """A new controller process."""
        self.killed = asyncio.Event()

    def restart_pe(self) -> None:
        """Its process; the kernel below keeps the address. Told to start the system, it may end before it does."""
        standby = self.standby
        if standby.mode in (*IN_PE, "booting"):
            standby.mode = "following" if self.cursor_is_good() else "comparing"
            standby.injected, standby.compared = False, 0

    def reset_pe(self) -> None:
        """The domain: another kernel, without the address; or the replicated system, if it boots from its disk."""
        standby = self.standby
        if standby.mode in (*IN_PE, "booting"):
            self.restart_pe()
            standby.boot, standby.address = standby.boot + 1, False
            if standby.boots_from_disk:
                standby.mode = "booting"
                self.check()

    def boot_from_disk(self) -> None:
        """The operator does what the remedy of ``standby-reset`` says."""
        if self.standby.mode != "up":
            self.standby.mode, self.standby.boots_from_disk = "booting", True
            self.check()

    # --- calls ------------------------------------------------------------------------------------------------------
    async def call(self, name: str, effect: Callable[[], Any], *, of: str = "") -> Any:
        """Everything the controller does to the world passes here."""
        if self.killed.is_set():
            await asyncio.Future()
        self.calls.append(name)
        fault = self.faults(name, len(self.calls))
        await asyncio.sleep(0.003)
        self.tick()
        if fault is not None and fault[1] == "before":
            await self._fail(fault[0], name)
        if (of == "agent" and not (self.source.alive and self.source.connected)) or (
            of == "pe" and not self.standby.connected
        ):
            raise Flaky(f"{name}: the peer is away")
        try:
            result = effect()
            self.check()
        except AssertionError as violation:
            # The controller takes any exception for a failure of the act: the test has to hear of it, too.
            self.violations.append(f"{name}: {violation}")
            raise
        self.tick()
        if fault is not None and fault[1] == "after":
            await self._fail(fault[0], name)
        return result

    async def _fail(self, kind: str, name: str) -> None:
        if kind == "kill":
            self.killed.set()
            await asyncio.Future()
        if kind == "hang":
            await asyncio.sleep(3600)
        if kind == "die":
            self.source.alive = False
            return
        if kind in ("restart-pe", "reset-pe"):
            self.restart_pe() if kind == "restart-pe" else self.reset_pe()
            return
        raise (Broken if kind == "error" else Flaky)(f"{name} failed on purpose.", remedy="None.")

    def ports(self) -> Ports:
        return Ports(
            agent=Agent(self), pe=Pe(self), store=Store(self), hypervisor=Hypervisor(self), probe=Prober(self),
            clock=self.clock,
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
