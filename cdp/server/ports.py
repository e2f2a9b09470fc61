"""The takeover controller's ports: the hub, the store, the hypervisor and the network as the server sees them."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec

from cdp.server import probes
from cdp.server.control import Hub, Slot
from cdp.server.errors import UnexpectedFrame
from cdp.server.machines import CONSUMER
from cdp.server.workers import Changes, Workers
from journal.errors import CdpError
from journal.position import Position
from journal.wire import AgentReport, StandbyReport
from standby.spec import Deadlines, MachineSpec, Probe, SourceDomain
from standby.takeover.errors import GenerationConflict
from standby.takeover.ports import Ports, Seen

if TYPE_CHECKING:
    from cdp.server.standbys import Standbys
    from cdp.store import Store

ABORT_S: Final = 30.0
FINISH_BOOT_S: Final = 5.0
"""The PE answers at once and leaves; an answer that is lost is lost for good."""


class _Peer:
    """Calls to one slot, with the deadlines of the machine's specification."""

    slot: Slot

    def __init__(self, hub: Hub, deadlines: Callable[[uuid.UUID], Deadlines], started_s: float) -> None:
        self._hub = hub
        self._deadlines_of = deadlines
        self._started_s = started_s

    async def _call(self, machine: str, verb: str, args: dict[str, Any], deadline_s: float) -> dict[str, Any]:
        return await self._hub.call(uuid.UUID(machine), self.slot, verb, args, deadline_s)

    def _deadlines(self, machine: str) -> Deadlines:
        return self._deadlines_of(uuid.UUID(machine))

    def _silent_s(self, machine: uuid.UUID) -> float:
        heard = self._hub.silent_for_s(machine, self.slot)
        return max(0.0, time.time() - self._started_s) if heard is None else heard


class AgentCalls(_Peer):
    slot: Slot = "agent"

    def seen(self, machine: str) -> Seen[AgentReport]:
        key = uuid.UUID(machine)
        report = self._hub.state(key, "agent").report
        return Seen(
            connected=self._hub.is_connected(key, "agent"),
            silent_s=self._silent_s(key),
            report=report if isinstance(report, AgentReport) else None,
        )

    def system_up(self, machine: str, takeover: str) -> bool:
        state = self._hub.state(uuid.UUID(machine), "taken-over")
        return (
            state.connected
            and state.hello is not None
            and state.hello.taken_over == takeover
            and isinstance(state.report, AgentReport)
            and state.report.state == "taken-over"
        )

    async def quiesce(self, machine: str, mode: str, lease_s: float) -> None:
        deadline_s = self._deadlines(machine).quiesce
        await self._call(machine, "quiesce", {"mode": mode, "deadline_s": deadline_s, "lease_s": lease_s}, deadline_s)

    async def thaw(self, machine: str) -> None:
        await self._call(machine, "thaw", {}, self._deadlines(machine).quiesce)

    async def seal(self, machine: str) -> Position:
        answer = await self._call(machine, "seal", {}, self._deadlines(machine).seal)
        return _position(answer, "position")

    async def fence(self, machine: str, generation: int, addresses: Sequence[str]) -> dict[str, Any]:
        args = {"generation": generation, "addresses": list(addresses)}
        return await self._call(machine, "fence", args, self._deadlines(machine).fence)

    async def unfence(self, machine: str, generation: int, tip: Position, addresses: Sequence[str]) -> None:
        args = {"generation": generation, "tip": str(tip), "addresses": list(addresses)}
        limits = self._deadlines(machine)
        await self._call(machine, "unfence", args, limits.fence + limits.quiesce)


class PeCalls(_Peer):
    slot: Slot = "pe"

    def seen(self, machine: str) -> Seen[StandbyReport]:
        key = uuid.UUID(machine)
        state = self._hub.state(key, "pe")
        return Seen(
            connected=self._hub.is_connected(key, "pe"),
            silent_s=self._silent_s(key),
            report=state.report if isinstance(state.report, StandbyReport) else None,
            boot_id=None if state.hello is None else state.hello.boot_id,
        )

    async def drain(self, machine: str, takeover: str, position: Position) -> Position:
        args = {"takeover": takeover, "position": str(position)}
        answer = await self._call(machine, "drain", args, self._deadlines(machine).drain)
        return _position(answer, "applied")

    async def inject(self, machine: str, takeover: str, spec: MachineSpec) -> list[str]:
        args = {"takeover": takeover, "spec": msgspec.to_builtins(spec)}
        return _texts(await self._call(machine, "inject", args, spec.deadlines.inject), "injected")

    async def take_address(self, machine: str, takeover: str, addresses: Sequence[str], force: bool) -> list[str]:
        args = {"takeover": takeover, "addresses": list(addresses), "force": force}
        return _texts(await self._call(machine, "take_address", args, self._deadlines(machine).ip_drift), "held")

    async def finish_boot(self, machine: str, takeover: str) -> None:
        await self._call(machine, "finish_boot", {"takeover": takeover}, FINISH_BOOT_S)

    async def abort(self, machine: str, takeover: str) -> None:
        await self._call(machine, "abort", {"takeover": takeover}, ABORT_S)


class StoreCalls:
    def __init__(self, store: Store, workers: Workers, changes: Changes) -> None:
        self._store = store
        self._workers = workers
        self._changes = changes

    async def live(self, machine: str) -> Position:
        return await self._workers.read(self._store.live, uuid.UUID(machine))

    async def started(self, machine: str, generation: int, parent: Position) -> bool:
        return await self._workers.read(self._started, uuid.UUID(machine), generation, parent)

    def _started(self, machine: uuid.UUID, generation: int, parent: Position) -> bool:
        return any(
            held.number == generation and held.parent == str(parent) for held in self._store.generations(machine)
        )

    async def start_generation(self, machine: str, generation: int, parent: Position, reason: str) -> Position:
        key = uuid.UUID(machine)
        genesis = await self._workers.write(self._start, key, generation, parent, reason)
        self._changes.notify(key)
        return genesis

    def _start(self, machine: uuid.UUID, generation: int, parent: Position, reason: str) -> Position:
        """Only one takeover of a machine is active and nobody else starts generations, so look and act do not race."""
        if self._started(machine, generation, parent):
            return Position.genesis(machine, generation, parent)
        live = self._store.live(machine)
        if live.generation != generation - 1:
            raise GenerationConflict(
                f"Generation {generation} cannot be started: generation {live.generation} is live.",
                remedy="The machine was seeded anew or taken over meanwhile. See 'cdp status'.",
                generation=generation,
                live_generation=live.generation,
            )
        return self._store.start_generation(machine, parent, reason)

    async def last_recovery_point(self, machine: str) -> Position | None:
        return await self._workers.read(self._store.last_recovery_point, uuid.UUID(machine))

    async def forget_standby(self, machine: str) -> None:
        await self._workers.write(self._store.remove_cursor, uuid.UUID(machine), CONSUMER)

    # --- RecordStore --------------------------------------------------------------------------------------------------
    async def save(self, takeover: str, raw: bytes) -> None:
        await self._workers.write(self._store.save_takeover, takeover, raw)

    async def load(self) -> dict[str, bytes]:
        return await self._workers.read(self._store.load_takeovers)


class HypervisorCalls:
    def __init__(self, standbys: Standbys) -> None:
        self._standbys = standbys

    async def state(self, spec: MachineSpec) -> str:
        return await self._standbys.state(spec)

    async def redefine_for_disk(self, spec: MachineSpec) -> None:
        await self._standbys.redefine_for_disk(spec)

    async def destroy(self, spec: MachineSpec) -> None:
        await self._standbys.destroy(spec)

    async def start_pe(self, spec: MachineSpec) -> None:
        await self._standbys.start_pe(spec)

    async def destroy_source(self, source: SourceDomain) -> None:
        await self._standbys.destroy_source(source)


class ProbeCalls:
    async def answering(self, addresses: Sequence[str], probes_: Sequence[Probe]) -> dict[str, str]:
        return await probes.answering(addresses, probes_)

    async def serving(self, address: str, probe: Probe) -> str | None:
        return await probes.serving(address, probe)


class SystemClock:
    def now_s(self) -> float:
        return time.time()

    def monotonic_s(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def make_ports(hub: Hub, store: StoreCalls, standbys: Standbys, deadlines: Callable[[uuid.UUID], Deadlines]) -> Ports:
    started_s = time.time()
    return Ports(
        agent=AgentCalls(hub, deadlines, started_s),
        pe=PeCalls(hub, deadlines, started_s),
        store=store,
        hypervisor=HypervisorCalls(standbys),
        probe=ProbeCalls(),
        clock=SystemClock(),
    )


def _position(answer: dict[str, Any], name: str) -> Position:
    try:
        return Position.parse(str(answer.get(name)))
    except ValueError:
        raise _unreadable(name) from None


def _texts(answer: dict[str, Any], name: str) -> list[str]:
    value = answer.get(name)
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise _unreadable(name)
    return value


def _unreadable(name: str) -> CdpError:
    return UnexpectedFrame(f"The peer's answer lacks a valid {name!r}.", remedy="Upgrade the older side.")
