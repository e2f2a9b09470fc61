"""The backup server as a process: the real store, ingest and feed over files that break."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from cdp.server.control import Hub
from cdp.server.feed import Feed, Range
from cdp.server.ingest import Ingest
from cdp.server.machines import CONSUMER, Machines, Side
from cdp.server.messages import ProtectRequest
from cdp.server.metrics import Counters
from cdp.server.reseed import Reseeds
from cdp.server.workers import ByteBudget, Changes, P, Workers
from cdp.store import Store
from journal import wire
from journal.errors import CdpError
from journal.position import Position
from journal.wire import DiskInfo
from standby.replay.ports import T, Until
from tests.sim.faults import Clock, Dice
from tests.sim.machine import Machine
from tests.store.faulty import FaultyFiles, PowerCut

_COUNTERS = Counters()


class InlineWorkers(Workers):
    """The work happens at once, in the only thread."""

    async def write(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return work(*args, **kwargs)

    async def read(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return work(*args, **kwargs)


class Owner:
    """``machines.Ownership``: which side owns the machine is the schedule's choice."""

    def __init__(self) -> None:
        self.fenced = False

    def side_of(self, machine: uuid.UUID) -> Side:
        return "standby" if self.fenced else "source"

    def check_replica(self, machine: uuid.UUID) -> None:
        """No schedule starts the replicated system."""

    def newest(self, machine: uuid.UUID) -> dict[str, Any] | None:
        return None

    def standby_state(self, machine: uuid.UUID, reported: str | None) -> str:
        return reported or ""


class Away(Exception):
    """Nobody answers."""


class Server:
    """``acknowledged``: every segment that the store said is durable, whether or not the answer arrived."""

    ingest: Ingest
    feed: Feed
    store: Store
    machines: Machines

    def __init__(
        self,
        dice: Dice,
        clock: Clock,
        model: Machine,
        directory: Path,
        *,
        files: type[FaultyFiles] = FaultyFiles,
        feed: type[Feed] = Feed,
    ) -> None:
        self.dice = dice
        self._clock = clock
        self._model = model
        self._directory = directory
        self._files = files
        self._feed = feed
        self.owner = Owner()
        self.up = False
        self.incarnation = 0
        self.acknowledged: dict[Position, bytes] = {}
        self._down = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._open()
        infos = [DiskInfo(index=n, name=f"vd{n}", size_bytes=size) for n, size in enumerate(model.sizes)]
        self.machine = self.store.create_machine("db1", infos).uuid
        self.machines.protect(self.machine, ProtectRequest())
        model.enrol(self.machine, self.store.live(self.machine))

    # --- the process ----------------------------------------------------------------------------------------------
    def _open(self) -> None:
        self.files = self._files(self.dice.random.randrange(2**32))
        if not self.dice.calm and self.dice.random.random() < 0.1:
            self.files.cut_after(self.dice.random.randrange(1, 4))
        try:
            self.store = Store.open(
                self._directory,
                file_bytes=self.dice.random.choice((16, 48, 256)) << 10,
                map_bytes=8 << 20,
                flush_interval_s=1e6,
                fs=self.files,
                clock_ns=self._clock.time_ns,
            )
        except PowerCut:
            self.files.power_cut()
            return
        self.files.cut_after(None)
        workers, budget = InlineWorkers(), ByteBudget(64 << 20)
        self.changes = Changes()
        self.machines = Machines(
            self.store, Hub(peers_max=1, on_hello=_nobody), takeovers=self.owner, domain_state=lambda _: "running"
        )
        self.ingest = Ingest(self.store, workers, self.changes, budget, _COUNTERS, request_idle_s=60.0)
        self.feed = self._feed(
            self.store,
            workers,
            self.changes,
            budget,
            self.machines,
            wait_s_max=30.0,
            reseeds=Reseeds(self.store),
            damaged=lambda _: set(),
        )
        self.up = True
        self.incarnation += 1
        self._down.clear()

    def crash(self) -> None:
        """The power goes."""
        if not self.up:
            return
        self.up = False
        self.files.power_cut()
        self.store.abandon()
        for task in self._tasks:
            task.cancel()
        self._down.set()

    async def live(self) -> None:
        """Start again after each crash, until cancelled."""
        while True:
            await self._down.wait()
            await asyncio.sleep(self.dice.random.choice((0.05, 1.0, 8.0)))
            while not self.up:
                self._open()
            self.check_acknowledged(self.dice.random.sample(sorted(self.acknowledged), min(3, len(self.acknowledged))))

    def close(self) -> None:
        _COUNTERS.forget(self.machine)
        if self.up:
            self.up = False
            self.store.abandon()

    async def serve(self, handler: Callable[[], Awaitable[T]]) -> T:
        """The handler's answer. It goes on when the client is gone; raises ``Away`` if the server is, or dies."""
        if not self.up:
            raise Away
        incarnation = self.incarnation
        task = asyncio.ensure_future(self._handle(handler))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            answer = await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled() and self.incarnation == incarnation and not self.up:
                raise Away from None
            raise
        if self.dice.happens("server-dies-before-answer"):
            self.crash()
        if not self.up or self.incarnation != incarnation:
            raise Away
        return answer

    async def _handle(self, handler: Callable[[], Awaitable[T]]) -> T:
        try:
            return await handler()
        except PowerCut:
            self.crash()
            raise Away from None

    # --- its services ---------------------------------------------------------------------------------------------
    async def state(self) -> wire.MachineState:
        return self.machines.wire_state(self.machine)

    async def put(self, position: Position, raw: bytearray) -> wire.StoredAnswer:
        answer = await self.ingest.take(self.machine, position.generation, position.seq, raw)
        self.acknowledged[Position.parse(answer.position)] = bytes(raw)
        self.check_tip()
        return answer

    async def follow(self, after: Position, until: Until, wait_s: float) -> wire.FeedAnswer:
        return await self.feed.following(self.machine, after, to_tip=until == "tip", wait_s=wait_s)

    async def segment(self, position: Position) -> bytes:
        header = self.feed.header_of(self.machine, position.generation, position.seq)
        return self.store.read_segment(self.machine, header.position)

    async def image(self, at: Position, disk: int, offset: int, length: int) -> bytes:
        return self.feed.image_of(self.machine, at, Range(disk, offset, length))

    async def hashes(self, disk: int, offset: int, length: int, chunk: int) -> bytes:
        return self.feed.hashes_of(self.machine, Range(disk, offset, length), chunk)

    async def cursor(self) -> Position | None:
        return self.store.cursor(self.machine, CONSUMER)

    async def set_cursor(self, position: Position | None) -> None:
        if position is None:
            self.store.remove_cursor(self.machine, CONSUMER)
        else:
            self.store.set_cursor(self.machine, CONSUMER, position)

    def branch(self, parent: Position | None) -> Position | None:
        """Start the next generation."""
        with suppress(CdpError):
            genesis = self.store.start_generation(self.machine, parent, "simulated")
            self._model.begin_generation(genesis, parent)
            self.changes.notify(self.machine)
            return genesis
        return None

    # --- invariants -----------------------------------------------------------------------------------------------
    def check_tip(self) -> None:
        """The history is a chain of what the source committed, and ends a recovery point where the source did."""
        tip = self.store.live(self.machine)
        assert tip in self._model.committed, f"{tip.short} is stored but was never sealed"
        point = self.store.last_recovery_point(self.machine)
        if point is not None:
            assert self._model.sealed[point].header.is_recovery_point

    def check_acknowledged(self, positions: list[Position]) -> None:
        self.check_tip()
        for position in positions:
            try:
                stored = self.store.read_segment(self.machine, position)
            except CdpError as error:
                raise AssertionError(f"{position.short} was acknowledged and is lost") from error
            assert stored == self.acknowledged[position], f"{position.short} was acknowledged and is another now"


async def _nobody(*_: object) -> None:
    return None
