"""What the takeover controller may ask of the PE. Every verb may be repeated and then gives the same answer.

drain ──► inject ──► finish_boot        take_address at any time after the fence
  └─ abort ◄─┘                          abort leads back to following, by comparing if something was injected
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import msgspec

from journal.errors import BadRequest, NotInjected
from journal.position import Position
from standby.pe.injection import InjectSpec
from standby.replay.arguments import parsed
from standby.replay.compare import StandbyComparison
from standby.replay.follow import Follower
from standby.takeover import address

ANNOUNCE_AT_S = (0.0, 1.0, 3.0)
"""Announcements are repeated, because any one frame may be lost and a switch learns the new port from the first."""


class _Args(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    takeover: str = ""


class DrainArgs(_Args):
    """Without a position: to the newest recovery point."""

    position: str | None = None


class InjectArgs(_Args):
    spec: dict[str, Any]
    """The machine's specification (``standby.spec.MachineSpec``); a PE reads of it what ``InjectSpec`` names."""


class AddressArgs(_Args):
    addresses: list[str]
    force: bool = False


class Boot(Protocol):
    """Changing and starting the replicated system. Blocking."""

    def inject(self, spec: InjectSpec, takeover: str) -> list[str]: ...

    def start(self) -> None:
        """Never returns if it works."""
        ...

    def release(self) -> None:
        """Let go of the disks."""
        ...


class Verbs:
    """One takeover at a time: the server sees to that."""

    def __init__(self, follower: Follower, boot: Boot, comparison: StandbyComparison | None = None) -> None:
        self._follower = follower
        self._boot = boot
        self._comparison = comparison
        self._injected: dict[str, list[str]] = {}
        self._one_at_a_time = asyncio.Lock()
        self._announcing: set[asyncio.Task[object]] = set()
        self.leaving = False

    def table(self) -> dict[str, Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]]:
        return {
            "drain": self.drain,
            "inject": self.inject,
            "take_address": self.take_address,
            "finish_boot": self.finish_boot,
            "abort": self.abort,
            "status": self.status,
        } | ({} if self._comparison is None else self._comparison.verbs())

    async def drain(self, raw: dict[str, Any]) -> dict[str, Any]:
        args = parsed(raw, DrainArgs)
        target = None if args.position is None else _position(args.position)
        if self._comparison is not None:
            self._comparison.give_up()
        return {"applied": str(await self._follower.drain(target))}

    async def inject(self, raw: dict[str, Any]) -> dict[str, Any]:
        args = parsed(raw, InjectArgs)
        spec = parsed(args.spec, InjectSpec)
        async with self._one_at_a_time:
            if args.takeover not in self._injected:
                # From here on the disks are not what the cursor says, whatever happens next.
                await self._follower.lend()
                self._injected[args.takeover] = await asyncio.to_thread(self._boot.inject, spec, args.takeover)
            return {"injected": self._injected[args.takeover]}

    async def take_address(self, raw: dict[str, Any]) -> dict[str, Any]:
        args = parsed(raw, AddressArgs)
        held = await asyncio.to_thread(address.take, args.addresses, force=args.force)
        # The repetitions must not hold the takeover up; what they lose in a kexec the new kernel announces itself.
        again = asyncio.ensure_future(asyncio.to_thread(address.announce, args.addresses, at_s=ANNOUNCE_AT_S[1:]))
        self._announcing.add(again)
        again.add_done_callback(self._announced)
        return {"held": sorted(held)}

    async def finish_boot(self, raw: dict[str, Any]) -> dict[str, Any]:
        args = parsed(raw, _Args)
        if args.takeover not in self._injected:
            raise NotInjected("Nothing was injected for this takeover.", remedy="Drain and inject first.")
        self.leaving = True
        return {}

    async def depart(self) -> None:
        """After the answer to ``finish_boot`` has been sent."""
        try:
            await asyncio.to_thread(self._boot.start)
        finally:
            self.leaving = False

    async def abort(self, raw: dict[str, Any]) -> dict[str, Any]:
        parsed(raw, _Args)
        async with self._one_at_a_time:
            self._injected.clear()
            await asyncio.to_thread(self._boot.release)
            self._follower.resume()
        return {}

    async def status(self, raw: dict[str, Any]) -> dict[str, Any]:
        parsed(raw, _Args)
        now = self._follower.status()
        return {
            "state": now.state,
            "applied": None if now.applied is None else str(now.applied),
            "consistent": now.consistent,
            "injected": sorted(self._injected),
        }

    def _announced(self, task: asyncio.Task[object]) -> None:
        self._announcing.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            print(f"cdp-pe: the addresses were not announced again: {error}")  # noqa: T201


def _position(text: str) -> Position:
    try:
        return Position.parse(text)
    except ValueError as error:
        raise BadRequest(str(error), remedy="Call again with a position.") from error
