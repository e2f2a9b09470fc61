"""One schedule: a machine, an agent, a server and a standby; chaos for a while; then everything must converge."""

from __future__ import annotations

import asyncio
import errno
import random
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cdp.agent.push import Pusher
from cdp.server.feed import Feed
from cdp.store import ImageReader
from standby.replay.follow import Follower
from tests.sim.agent import Agent
from tests.sim.disk import CachedDisk
from tests.sim.faults import Clock, Dice
from tests.sim.machine import Machine
from tests.sim.network import AgentLink
from tests.sim.server import Server
from tests.sim.standby import Standby
from tests.store.faulty import FaultyFiles
from tests.takeover.virtual_time import run

SCRATCH: Final = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
SIZES: Final = (16 << 10, 64 << 10, 64 << 10, 64 << 10, 256 << 10)
CONVERGE_S: Final = 150.0
"""Virtual: several times the longest pauses of all parts together."""


@dataclass(frozen=True)
class Parts:
    """What a mutation replaces."""

    files: type[FaultyFiles] = FaultyFiles
    feed: type[Feed] = Feed
    pusher: type[Pusher] = Pusher
    follower: type[Follower] = Follower
    disk: type[CachedDisk] = CachedDisk


class World:
    def __init__(self, dice: Dice, directory: Path, parts: Parts) -> None:
        self.dice = dice
        self.trace: list[str] = []
        self.clock = Clock()
        rng = dice.random
        self.model = Machine(dice, self.clock, [rng.choice(SIZES) for _ in range(rng.choice((1, 1, 2)))])
        self.server = Server(dice, self.clock, self.model, directory / "store", files=parts.files, feed=parts.feed)
        self.agent = Agent(dice, self.model, AgentLink(dice, self.server), directory / "spool", pusher=parts.pusher)
        self.standby = Standby(dice, self.clock, self.model, self.server, follower=parts.follower, disk=parts.disk)
        self._duration_s = rng.choice((6.0, 12.0, 25.0))
        self._drill: asyncio.Task[None] | None = None

    async def play(self) -> None:
        tasks = [
            asyncio.ensure_future(work)
            for work in (self.server.live(), self.agent.live(), self.standby.live(), self._load(), self._watch())
        ]
        chaos = asyncio.ensure_future(self._chaos_then_calm())
        try:
            await asyncio.wait([*tasks, chaos], return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended = [task for task in (*tasks, chaos) if task.done()]
            drill = [] if self._drill is None else [self._drill]
            for task in (*tasks, chaos, *drill):
                task.cancel()
            await asyncio.gather(*tasks, chaos, *drill, return_exceptions=True)
            self._note("the end")
        for task in ended:
            task.result()
        self._check_drill()
        self._check_equal()

    def _check_drill(self) -> None:
        if self._drill is not None and not self._drill.cancelled():
            self._drill.result()

    async def _load(self) -> None:
        """The machine's own writes go on whatever happens to the agent."""
        busy = self.dice.random.choice((0.5, 1.5, 6.0))
        while not self.dice.calm:
            await asyncio.sleep(self.dice.random.expovariate(busy))
            self.model.write()
        await asyncio.Event().wait()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(0.7)
            self.standby.watch()

    async def _chaos_then_calm(self) -> None:
        loop = asyncio.get_running_loop()
        acts: tuple[Callable[[], None], ...] = (
            self.agent.kill,
            self.agent.reboot,
            self._cut_server_soon,
            self.server.crash,
            self.standby.kill,
            self.standby.cut_power,
            self._kill_standby_soon,
            self._fail_standby_disk,
            self._fail_store,
            self._cut_link,
            self._jump_clock,
            self._branch,
            self._fence,
            self._start_drill,
            self._start_drill,
            self._flush_index,
            self._flush_index,
        )
        weights = [self.dice.random.choice((0, 0, 1, 3)) for _ in acts]
        for always in (-1, -3, -4):
            weights[always] = self.dice.random.choice((1, 3))
        pace_s = self.dice.random.choice((0.6, 1.5, 4.0))
        while (left := self._duration_s - loop.time()) > 0:
            await asyncio.sleep(min(left, self.dice.random.expovariate(1 / pace_s)))
            act = self.dice.random.choices(acts, weights)[0]
            self._note(act.__qualname__)
            act()
        await self._calm()

    async def _calm(self) -> None:
        """No fault any more: within bounded time everything is everywhere."""
        self.dice.calm = True
        self.server.owner.fenced = False
        if self.server.up:
            self.server.files.cut_after(None)
            self.server.files.fail_next = None
        for disk in self.standby.disks.values():
            disk.heal()
        self.agent.quiet = True
        self._note("calm")
        end = asyncio.get_running_loop().time() + CONVERGE_S
        while not self._converged():
            assert asyncio.get_running_loop().time() < end, f"no convergence: {self._standing()}"
            await asyncio.sleep(0.5)

    def _converged(self) -> bool:
        if not self.server.up or not self.agent.clean:
            return False
        tip = self.agent.tip
        status = self.standby.follower.status()
        held = self.server.store.cursor(self.server.machine, "standby")
        return self.server.store.live(self.server.machine) == tip == status.applied == held and status.consistent

    def _standing(self) -> str:
        tip = self.agent.tip
        live = self.server.store.live(self.server.machine).short if self.server.up else "down"
        ours = tip.short if tip else "nowhere"
        return f"agent {ours}, clean: {self.agent.clean}; server {live}; {self.standby.follower.status()}"

    def _check_equal(self) -> None:
        """Source, store and standby hold the same, and everything that was acknowledged is there."""
        store, machine, tip = self.server.store, self.server.machine, self.agent.tip
        assert tip is not None
        with ImageReader(store, machine, tip) as image:
            for number, disk in enumerate(self.model.disks):
                assert image.read(number, 0, len(disk)) == disk, f"the store's disk {number} differs"
        assert self.model.images[tip] == tuple(map(bytes, self.model.disks))
        assert self.standby.equals(tip), "the standby's disks differ"
        self.standby.check()
        self.server.check_acknowledged(sorted(self.server.acknowledged))

    # --- acts ---------------------------------------------------------------------------------------------------------
    def _cut_server_soon(self) -> None:
        self.server.files.cut_after(self.dice.random.randint(1, 12))

    def _kill_standby_soon(self) -> None:
        self._some_disk().die_in = self.dice.random.randint(1, 6)

    def _fail_standby_disk(self) -> None:
        disk = self._some_disk()
        disk.fail_next = self.dice.random.choice(("any", "flush"))
        disk.fail_calls = self.dice.random.choice((1, 1, 6))
        if self.dice.random.random() < 0.4:
            asyncio.get_running_loop().call_later(self.dice.random.uniform(0.5, 3.0), self._branch)

    def _some_disk(self) -> CachedDisk:
        return self.standby.disks[self.dice.random.randrange(len(self.standby.disks))]

    def _fail_store(self) -> None:
        self.server.files.fail_next = self.dice.random.choice((errno.ENOSPC, errno.EIO))

    def _cut_link(self) -> None:
        link = self.dice.random.choice((self.agent.link, self.standby.link))
        link.cut_until = asyncio.get_running_loop().time() + self.dice.random.uniform(0.5, 8.0)

    def _jump_clock(self) -> None:
        self.clock.wall_offset_s += self.dice.random.choice((-3600.0, -2.5, 2.5, 3600.0))

    def _branch(self) -> None:
        """A rollback, or a takeover that was undone: the next generation grows out of some recovery point."""
        if not self.server.up or self.dice.calm:
            return
        store, machine = self.server.store, self.server.machine
        points = [position for position in sorted(self.server.acknowledged) if store.contains(machine, position)]
        points = [position for position in points if self.model.sealed[position].header.is_recovery_point]
        applied = self.standby.follower.status().applied
        there = [applied] * 8 if applied in points else []
        parent = self.dice.random.choice((None, *points[-4:], *points[-1:], *points[-1:], *there))
        self.agent.excused = True
        self._note(f"generation on {parent.short if parent else None}")
        self.server.branch(parent)

    def _fence(self) -> None:
        self.server.owner.fenced = not self.server.owner.fenced
        if self.server.owner.fenced:
            self._branch()

    def _start_drill(self) -> None:
        if self._drill is not None:
            if not self._drill.done():
                return
            self._check_drill()
        self._drill = asyncio.ensure_future(self.standby.drill(lend=self.dice.random.random() < 0.4))

    def _flush_index(self) -> None:
        if self.server.up:
            self.server.store.flush()

    def _note(self, what: str) -> None:
        self.trace.append(f"{asyncio.get_running_loop().time():8.3f} {what}")


def play(seed: int, parts: Parts | None = None) -> World:
    """Play the schedule of ``seed``. Raises ``AssertionError`` (with what led to it as a note) if an invariant is
    broken."""
    directory = Path(tempfile.mkdtemp(prefix="cdp-sim-", dir=SCRATCH))
    dice = Dice(seed)
    before = random.getstate()
    random.seed(seed)  # the jitter of pauses comes from the module's own generator
    world: World | None = None

    async def schedule() -> None:
        nonlocal world
        world = World(dice, directory, parts or Parts())
        await world.play()

    try:
        run(schedule())
    except BaseException as error:
        error.add_note(
            f"seed {seed}; play it again with: CDP_SIM_SEED={seed} pytest tests/sim/test_schedules.py::test_schedules"
        )
        if world is not None:
            error.add_note("\n".join(world.trace[-40:]))
        raise
    finally:
        random.setstate(before)
        with suppress(Exception):
            if world is not None:
                world.server.close()
        shutil.rmtree(directory, ignore_errors=True)
    assert world is not None
    return world
