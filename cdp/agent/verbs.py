"""What the server may order, and what the agent does of its own accord when its place in the history changes.

    verb      does                                                          repeated
    quiesce   stops writers, under a lease                                  again, harmless
    thaw      starts them; ends a hold                                      nothing to do
    seal      a recovery point now, stored; holds if quiesced               the same position while held or fenced
    fence     no more segments; addresses off, noted, verified              the same evidence
    unfence   addresses on, services started, history goes on               nothing to do
    resync    compares everything with the server, or sends ranges anew     another one
    compare   tells what the disks hold at a position                       how far it is; the same again
    address   adds service addresses                                        nothing to do
    bookmark  a recovery point now, application-consistent if asked for     another one
    limit     how fast to send from now on                                  nothing to do

All orders take one lock: they change the same things. A bookmark takes it only while the machine is held still, a limit
not at all: another order may be waiting for what is being sent.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, ParamSpec, TypeVar

import msgspec

from cdp.agent.bookmarks import BookmarkArgs, Bookmarks
from cdp.agent.client import Client
from cdp.agent.dedup import settled_state
from cdp.agent.errors import NotFencedHere, UnknownVerb
from cdp.agent.fence import Fencer, add_addresses, announce_addresses, load_netlink
from cdp.agent.freezing import Freezer
from cdp.agent.pipeline import Pipeline
from cdp.agent.push import Pusher
from cdp.agent.quiesce import Quiescer
from cdp.agent.state import Mode, StateDir
from cdp.agent.status import Status
from journal.errors import CdpError
from journal.position import Position
from journal.wire import MachineState

log = logging.getLogger(__name__)

LEASE_S: Final = 120.0
"""Of a quiesce order that names none."""
FORK_WINDOW_S: Final = 600.0
"""Histories that part twice within this time have two writers: a person has to look."""
ENFORCE_S: Final = 1.0
"""How often a lease is looked at, and a fenced machine for an address that has come back."""

_ArgsT = TypeVar("_ArgsT", bound=msgspec.Struct)
_ActP = ParamSpec("_ActP")
Verb = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


class _Args(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    pass


class QuiesceArgs(_Args):
    mode: Mode
    deadline_s: float = 60.0
    lease_s: float = LEASE_S


class FenceArgs(_Args):
    generation: int
    addresses: list[str]


class UnfenceArgs(_Args):
    generation: int
    tip: str
    addresses: list[str]


class ResyncArgs(_Args):
    """``ranges``: only these ``(disk, offset, length)``, sent whatever they hold; None: compare everything."""

    reason: str = "requested"
    ranges: list[tuple[int, int, int]] | None = None


class CompareArgs(_Args):
    """``finish``: the disks at the next position; answered when the server has it."""

    comparison: str
    finish: bool = False


class AddressArgs(_Args):
    add: list[str]


class LimitArgs(_Args):
    bytes_per_s_max: int | None


class NoArgs(_Args):
    pass


class Orders:
    """``connect`` gives it the pusher right after construction: the two know each other."""

    pusher: Pusher

    def __init__(
        self,
        *,
        state: StateDir,
        pipeline: Pipeline,
        fencer: Fencer,
        quiescer: Quiescer,
        client: Client,
        status: Status,
        freezer: Freezer,
    ) -> None:
        self._state = state
        self._pipeline = pipeline
        self._fencer = fencer
        self._quiescer = quiescer
        self._client = client
        self._status = status
        self._lock = asyncio.Lock()
        self.bookmarks = Bookmarks(pipeline, freezer, status, self._lock)
        self._last_fork: float | None = None
        self._background: set[asyncio.Task[None]] = set()
        status.quiesced = quiescer.noted is not None

    def connect(self, pusher: Pusher) -> None:
        self.pusher = self.bookmarks.pusher = pusher

    def verbs(self) -> dict[str, Verb]:
        return {
            "quiesce": self._order(QuiesceArgs, self._quiesce),
            "thaw": self._order(NoArgs, self._thaw),
            "seal": self._order(NoArgs, self._seal),
            "fence": self._order(FenceArgs, self._fence),
            "unfence": self._order(UnfenceArgs, self._unfence),
            "resync": self._order(ResyncArgs, self._resync),
            "compare": self._order(CompareArgs, self._compare, alone=False),
            "address": self._order(AddressArgs, self._address),
            "bookmark": self._order(BookmarkArgs, self.bookmarks.add, alone=False),
            "limit": self._order(LimitArgs, self._limit, alone=False),
        }

    def _order(
        self, kind: type[_ArgsT], act: Callable[[_ArgsT], Awaitable[dict[str, Any]]], *, alone: bool = True
    ) -> Verb:
        async def obey(raw: dict[str, Any]) -> dict[str, Any]:
            try:
                args = msgspec.convert(raw, kind)
            except msgspec.ValidationError as error:
                raise UnknownVerb(f"The arguments make no sense: {error}.", remedy="Upgrade the older side.") from error
            if not alone:
                return await act(args)
            async with self._lock:
                return await act(args)

        return obey

    # --- takeover -----------------------------------------------------------------------------------------------------
    async def _quiesce(self, args: QuiesceArgs) -> dict[str, Any]:
        if self._fencer.fence is None:
            self._in_background(load_netlink)
            await self._quiescer.quiesce(args.mode, args.deadline_s, args.lease_s)
            self._status.quiesced = True
        return {}

    async def _thaw(self, _: NoArgs) -> dict[str, Any]:
        if self._fencer.fence is None:
            await self._quiescer.undo()
            self._status.quiesced = False
            self._pipeline.release()
        return {}

    async def _seal(self, _: NoArgs) -> dict[str, Any]:
        fence = self._fencer.fence
        if fence is not None and fence.tip is not None:
            return {"position": fence.tip}
        position = await self._pipeline.seal_now(hold=self._status.quiesced and not self._writers_go_on)
        self.pusher.notify()
        await self.pusher.wait_stored(position)
        return {"position": str(position)}

    async def _fence(self, args: FenceArgs) -> dict[str, Any]:
        if self._writers_go_on:
            await self._seal_last(args)
        return await self._stand_down(args.generation, args.addresses)

    @property
    def _writers_go_on(self) -> bool:
        """Only the loss of the addresses can stop them."""
        fence, noted = self._fencer.fence, self._quiescer.noted
        return fence.sealing if fence is not None else noted is not None and noted.mode == "none"

    async def _seal_last(self, args: FenceArgs) -> None:
        """What was acknowledged while the addresses were there is written by now: make it part of the history."""
        await self._fencer.raise_(args.generation, args.addresses, None, "none", sealing=True)
        position = await self._pipeline.seal_now(hold=True)
        self.pusher.notify()
        await self.pusher.wait_stored(position)

    async def _stand_down(self, generation: int, addresses: list[str]) -> dict[str, Any]:
        self._status.fenced = True
        self.pusher.paused = True
        await self._pipeline.fence()
        noted = self._quiescer.noted
        # A frozen file system could not take the note of the fence; nothing that is written now matters any more.
        await self._quiescer.thaw_only()
        mode = None if noted is None else noted.mode
        before = self._fencer.fence
        tip = Position.parse(before.tip) if before is not None and before.tip is not None else self._pipeline.tip
        evidence = await self._fencer.raise_(generation, addresses, tip, mode)
        self._quiescer.forget()
        self._status.quiesced = False
        return evidence

    async def _unfence(self, args: UnfenceArgs) -> dict[str, Any]:
        fence = self._fencer.fence
        if fence is None:
            return {}
        tip = Position.parse(args.tip)
        if args.generation < fence.generation or tip.generation != args.generation:
            raise NotFencedHere(
                f"This machine is fenced for generation {fence.generation}; {args.generation} does not lift that.",
                remedy="Ask the server for the live generation.",
                generation=args.generation,
                fenced_generation=fence.generation,
            )
        if self._fencer.whole or (ours := self._pipeline.tip) is None or ours.generation != tip.generation:
            await self._pipeline.lift(tip)
        else:
            self._pipeline.release()  # it never stopped sealing
        await self._fencer.lift(args.addresses)
        if fence.quiesced is not None:
            await self._quiescer.undo(fence.quiesced)
        await self._fencer.forget()
        self._status.fenced = False
        self.pusher.paused = False
        self.pusher.notify()
        self._in_background(announce_addresses, args.addresses)
        return {}

    def _in_background(self, act: Callable[_ActP, None], *args: _ActP.args, **kwargs: _ActP.kwargs) -> None:
        """Start something that nobody waits for."""
        task = asyncio.create_task(asyncio.to_thread(act, *args, **kwargs))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    # --- the rest -----------------------------------------------------------------------------------------------------
    async def _resync(self, args: ResyncArgs) -> dict[str, Any]:
        self._last_fork = None
        if self.pusher.paused and self._fencer.fence is None:
            self.pusher.paused = False  # it had stopped over a fork
            self._status.works("history")
            self.pusher.notify()
        if args.ranges is not None:
            await self._pipeline.copy_again(args.ranges)
        else:
            await self._pipeline.compare(args.reason)
        return {}

    async def _compare(self, args: CompareArgs) -> dict[str, Any]:
        comparison = self._pipeline.comparison
        if not args.finish:
            return comparison.ask(args.comparison)
        told = await comparison.finish(args.comparison)
        self.pusher.notify()
        await self.pusher.wait_stored(Position.parse(told.position))
        await self._client.put_comparison(args.comparison, await asyncio.to_thread(told.encode))
        return {"position": told.position}

    async def _address(self, args: AddressArgs) -> dict[str, Any]:
        if self._fencer.fence is not None:
            raise NotFencedHere("This machine is fenced: it takes no address.", remedy="Lift the fence first.")
        held = await asyncio.to_thread(add_addresses, args.add)
        return {"held": list(held)}

    async def _limit(self, args: LimitArgs) -> dict[str, Any]:
        self._client.bucket.set_rate(args.bytes_per_s_max)
        return {}

    # --- of its own accord --------------------------------------------------------------------------------------------
    async def superseded(self, state: MachineState) -> None:
        """The server says that another side owns the machine."""
        async with self._lock:
            if not self._fencer.whole:
                log.error("superseded: generation %d is live on another side", state.generation)
                addresses = state.service_addresses or self._state.addresses()
                await self._stand_down(state.generation, addresses)

    async def diverged(self, reason: str) -> None:
        """What we sealed does not fit what the server has: go on at its tip, with everything compared."""
        async with self._lock:
            if self._fencer.whole:
                return
            now = time.monotonic()
            if reason == "position-fork" and self._last_fork is not None and now - self._last_fork < FORK_WINDOW_S:
                self.pusher.paused = True
                self._status.failed(
                    "history",
                    NotFencedHere(
                        "The history has forked again: another agent seems to push for this machine.",
                        remedy="Stop the other one (a copy of this machine?), then restart this agent.",
                    ),
                )
                return
            if reason == "position-fork":
                self._last_fork = now
            await self._pipeline.begin(await settled_state(self._client), reason)

    def told_addresses(self, addresses: list[str]) -> None:
        """The server's list of service addresses; kept for the day when it cannot be asked."""
        self._state.save_addresses(addresses)

    async def watch(self) -> None:
        """Until cancelled: end leases that ran out, keep fenced addresses off."""
        while True:
            noted = self._quiescer.noted
            if noted is not None and time.monotonic_ns() >= noted.until_ns and self._fencer.fence is None:
                async with self._lock:
                    log.error("quiesced for too long without a fence: starting what was stopped")
                    try:
                        await self._thaw(NoArgs())
                        self._status.works("quiesce")
                    except CdpError as error:
                        self._status.failed("quiesce", error)
            try:
                await self.bookmarks.enforce()
                self._status.works("bookmark")
            except CdpError as error:
                self._status.failed("bookmark", error)
            # Not in the middle of an unfence: it puts the addresses back before it deletes the note of the fence.
            async with self._lock:
                if self._fencer.fence is not None:
                    try:
                        await self._fencer.enforce()
                        self._status.works("fence")
                    except CdpError as error:
                        self._status.failed("fence", error)
            await asyncio.sleep(ENFORCE_S)

    async def enforce_at_start(self) -> None:
        """Before anything else: a fence outlives the agent and the boot, and nothing may stay frozen."""
        await self.bookmarks.enforce()
        if self._fencer.whole:
            self._status.fenced = True
            self.pusher.paused = True
            await self._pipeline.fence()
        await self._fencer.enforce()
