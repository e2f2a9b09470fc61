"""The agent and the PE as ports, over the server's control channel: which verb, which arguments, which answer.

    agent   quiesce {mode, deadline_s}             -> {}
            thaw {}                                -> {}
            seal {}                                -> {position}
            fence {generation, addresses}          -> {removed, remaining, position?}
            unfence {generation, tip, addresses}   -> {}
    pe      drain {takeover, position}             -> {applied}
            inject {takeover, spec}                -> {injected}
            take_address {takeover, addresses, force} -> {held}
            finish_boot {takeover}                 -> {}
            abort {takeover}                       -> {}

``deadline_s`` of quiesce is the lease: the agent thaws by itself that long after it, unless it has been fenced.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import msgspec

from journal.errors import CdpError
from journal.position import Position
from journal.wire import AgentReport, Hello, StandbyReport
from standby.spec import MachineSpec
from standby.takeover.ports import Seen

Slot = Literal["agent", "taken-over", "pe"]


class PeerState(Protocol):
    """What is known of a peer; ``last_heard_s`` is meaningless if there is neither hello nor report."""

    @property
    def hello(self) -> Hello | None: ...
    @property
    def report(self) -> AgentReport | StandbyReport | None: ...
    @property
    def connected(self) -> bool: ...


class Channel(Protocol):
    """The server's hub."""

    def state(self, machine: uuid.UUID, slot: Slot) -> PeerState: ...
    def silent_for_s(self, machine: uuid.UUID, slot: Slot) -> float | None:
        """Seconds since the peer was last heard, None if it never was."""
        ...

    async def call(
        self, machine: uuid.UUID, slot: Slot, verb: str, args: dict[str, Any], deadline_s: float
    ) -> dict[str, Any]: ...


class Uptime(Protocol):
    def __call__(self) -> float:
        """Seconds for which the server has been listening: a peer that never came was silent for that long."""
        ...


class AnswerMalformed(CdpError):
    """A peer answered a verb with something else than the protocol says."""

    code = "answer-malformed"


class RemoteAgent:
    """``AgentPort`` over the hub."""

    def __init__(self, channel: Channel, uptime: Uptime) -> None:
        self._channel = channel
        self._uptime = uptime

    def seen(self, machine: str) -> Seen[AgentReport]:
        state = self._channel.state(uuid.UUID(machine), "agent")
        report = state.report if isinstance(state.report, AgentReport) else None
        return Seen(state.connected, _silent_s(self._channel, machine, "agent", self._uptime), report)

    def system_up(self, machine: str, takeover: str) -> bool:
        state = self._channel.state(uuid.UUID(machine), "taken-over")
        return (
            state.connected
            and state.hello is not None
            and state.hello.taken_over == takeover
            and isinstance(state.report, AgentReport)
            and state.report.state == "taken-over"
        )

    async def quiesce(self, machine: str, mode: str, lease_s: float, *, deadline_s: float) -> None:
        await self._call(machine, "quiesce", {"mode": mode, "deadline_s": lease_s}, deadline_s)

    async def thaw(self, machine: str, *, deadline_s: float) -> None:
        await self._call(machine, "thaw", {}, deadline_s)

    async def seal(self, machine: str, *, deadline_s: float) -> Position:
        return _position(await self._call(machine, "seal", {}, deadline_s), "position")

    async def fence(
        self, machine: str, generation: int, addresses: Sequence[str], *, deadline_s: float
    ) -> dict[str, Any]:
        return await self._call(machine, "fence", {"generation": generation, "addresses": list(addresses)}, deadline_s)

    async def unfence(
        self, machine: str, generation: int, tip: Position, addresses: Sequence[str], *, deadline_s: float
    ) -> None:
        args = {"generation": generation, "tip": str(tip), "addresses": list(addresses)}
        await self._call(machine, "unfence", args, deadline_s)

    async def _call(self, machine: str, verb: str, args: dict[str, Any], deadline_s: float) -> dict[str, Any]:
        return await self._channel.call(uuid.UUID(machine), "agent", verb, args, deadline_s)


class RemotePe:
    """``PePort`` over the hub."""

    def __init__(self, channel: Channel, uptime: Uptime) -> None:
        self._channel = channel
        self._uptime = uptime

    def seen(self, machine: str) -> Seen[StandbyReport]:
        state = self._channel.state(uuid.UUID(machine), "pe")
        report = state.report if isinstance(state.report, StandbyReport) else None
        return Seen(state.connected, _silent_s(self._channel, machine, "pe", self._uptime), report)

    async def drain(self, machine: str, takeover: str, position: Position, *, deadline_s: float) -> Position:
        args = {"takeover": takeover, "position": str(position)}
        return _position(await self._call(machine, "drain", args, deadline_s), "applied")

    async def inject(self, machine: str, takeover: str, spec: MachineSpec, *, deadline_s: float) -> list[Any]:
        args = {"takeover": takeover, "spec": msgspec.to_builtins(spec)}
        return _list(await self._call(machine, "inject", args, deadline_s), "injected")

    async def take_address(
        self, machine: str, takeover: str, addresses: Sequence[str], force: bool, *, deadline_s: float
    ) -> list[str]:
        args = {"takeover": takeover, "addresses": list(addresses), "force": force}
        return [str(text) for text in _list(await self._call(machine, "take_address", args, deadline_s), "held")]

    async def finish_boot(self, machine: str, takeover: str, *, deadline_s: float) -> None:
        await self._call(machine, "finish_boot", {"takeover": takeover}, deadline_s)

    async def abort(self, machine: str, takeover: str, *, deadline_s: float) -> None:
        await self._call(machine, "abort", {"takeover": takeover}, deadline_s)

    async def _call(self, machine: str, verb: str, args: dict[str, Any], deadline_s: float) -> dict[str, Any]:
        return await self._channel.call(uuid.UUID(machine), "pe", verb, args, deadline_s)


def _silent_s(channel: Channel, machine: str, slot: Slot, uptime: Uptime) -> float:
    silent_s = channel.silent_for_s(uuid.UUID(machine), slot)
    return uptime() if silent_s is None else silent_s


def _position(answer: dict[str, Any], key: str) -> Position:
    try:
        return Position.parse(str(answer[key]))
    except (KeyError, ValueError) as error:
        raise _malformed(answer, key) from error


def _list(answer: dict[str, Any], key: str) -> list[Any]:
    value = answer.get(key)
    if not isinstance(value, list):
        raise _malformed(answer, key)
    return value


def _malformed(answer: dict[str, Any], key: str) -> AnswerMalformed:
    return AnswerMalformed(
        f"An answer has no valid {key!r}.", remedy="Upgrade the older side.", key=key, answer=str(answer)[:200]
    )
