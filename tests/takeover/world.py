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
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from blake3 import blake3

from journal.errors import CdpError
from journal.position import Position
from standby.spec import Deadlines, MachineSpec, Probe, StandbySpec
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
