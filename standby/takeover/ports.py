"""Everything that the controller touches, as protocols: the tests put a breakable world behind them.

All calls may raise ``CdpError`` (``transient`` ones are repeated until the phase's deadline), ``OSError`` or
``TimeoutError``, and may be cancelled at the deadline. All are idempotent: a call whose answer was lost is repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from journal.position import Position
from journal.wire import AgentReport, StandbyReport
from standby.spec import MachineSpec, Probe, SourceDomain

Report = TypeVar("Report")


@dataclass(frozen=True, slots=True)
class Seen(Generic[Report]):
    """The last report of a peer and its age. ``silent_s`` counts from the server's start if there never was one.
    ``boot_id`` names the run of the kernel that the peer spoke from last: a kexec or a reset gives another one."""

    connected: bool
    silent_s: float
    report: Report | None = None
    boot_id: str | None = None


class AgentPort(Protocol):
    """The source's agent."""

    def seen(self, machine: str) -> Seen[AgentReport]:
        """Of the *source*, never of the replicated agent on the standby."""
        ...

    def system_up(self, machine: str, takeover: str) -> bool:
        """Has the replicated agent, on the standby, reported that the system of this takeover is up?"""
        ...

    async def quiesce(self, machine: str, mode: str, lease_s: float) -> None:
        """Stop writers. The agent thaws by itself after ``lease_s`` unless it has been fenced by then."""
        ...

    async def thaw(self, machine: str) -> None: ...

    async def seal(self, machine: str) -> Position:
        """Cut now; returns once that position is stored."""
        ...

    async def fence(self, machine: str, generation: int, addresses: Sequence[str]) -> dict[str, Any]:
        """Give the addresses up, stop sealing, keep both across a reboot. ``generation`` is the one that ends; it, or a
        later one, lifts the fence again. Evidence: ``removed`` and ``remaining`` (must be empty). What the agent seals
        and stores before it answers is taken over too."""
        ...

    async def unfence(self, machine: str, generation: int, tip: Position, addresses: Sequence[str]) -> None:
        """The source may hold the addresses again and continues ``generation`` after ``tip``."""
        ...


class PePort(Protocol):
    """The standby's PE."""

    def seen(self, machine: str) -> Seen[StandbyReport]: ...

    async def drain(self, machine: str, takeover: str, position: Position) -> Position:
        """Apply up to exactly ``position``, stop there; returns what is applied and durable."""
        ...

    async def inject(self, machine: str, takeover: str, spec: MachineSpec) -> list[str]:
        """Returns what was written into the replicated system."""
        ...

    async def take_address(self, machine: str, takeover: str, addresses: Sequence[str], force: bool) -> list[str]:
        """Returns the addresses that it holds now, probed (unless ``force``), added and announced."""
        ...

    async def finish_boot(self, machine: str, takeover: str) -> None:
        """Returns just before kexec. ``NotInjected`` if the PE's process knows of no injection."""
        ...


class StorePort(Protocol):
    async def live(self, machine: str) -> Position:
        """The tip of the live generation."""
        ...

    async def started(self, machine: str, generation: int, parent: Position) -> bool:
        """Is ``generation``, with exactly this parent, in the machine's history?"""
        ...

    async def start_generation(self, machine: str, generation: int, parent: Position, reason: str) -> Position:
        """Its genesis. The same answer if it was started already; ``GenerationConflict`` if ``generation`` is not the
        next one or has another parent."""
        ...

    async def last_recovery_point(self, machine: str) -> Position | None: ...

    async def forget_standby(self, machine: str) -> None:
        """Drop the standby's cursor: its disk has left the journal's history, so it has to compare and resync."""
        ...


class HypervisorPort(Protocol):
    async def state(self, spec: MachineSpec) -> str:
        """``running``, ``off`` or ``absent``."""
        ...

    async def redefine_for_disk(self, spec: MachineSpec) -> None:
        """From its next start on the standby boots from its disk."""
        ...

    async def destroy(self, spec: MachineSpec) -> None:
        """Power the standby off, at once."""
        ...

    async def start_pe(self, spec: MachineSpec) -> None:
        """Define the standby to boot the PE and start it, if it is off."""
        ...

    async def destroy_source(self, source: SourceDomain) -> None:
        """Power off the source, which is itself a domain; returns once the hypervisor says that it is off."""
        ...


class ProbePort(Protocol):
    """Asks from the server's place."""

    async def answering(self, addresses: Sequence[str], probes: Sequence[Probe]) -> dict[str, str]:
        """Address -> what answers there: a neighbour's MAC, or a probed service. Takes about a second."""
        ...

    async def serving(self, address: str, probe: Probe) -> str | None:
        """None if the service answers as it should, otherwise what was seen. Returns within a second."""
        ...


class ClockPort(Protocol):
    def now_s(self) -> float:
        """Seconds since the Unix epoch."""
        ...

    def monotonic_s(self) -> float: ...

    async def sleep(self, seconds: float) -> None: ...


@dataclass(frozen=True, slots=True)
class Ports:
    agent: AgentPort
    pe: PePort
    store: StorePort
    hypervisor: HypervisorPort
    probe: ProbePort
    clock: ClockPort
