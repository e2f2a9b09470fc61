"""The standby as a process: the real follower on disks with a volatile cache."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

from cdp.server.machines import CONSUMER
from journal.errors import CdpError
from journal.position import Position
from standby.replay.follow import Follower
from tests.sim.disk import CachedDisk
from tests.sim.faults import Clock, Dice, inline
from tests.sim.machine import Machine
from tests.sim.network import StandbyLink
from tests.sim.process import Process
from tests.sim.server import Server


class Standby(Process):
    follower: Follower

    def __init__(
        self,
        dice: Dice,
        clock: Clock,
        model: Machine,
        server: Server,
        *,
        follower: type[Follower] = Follower,
        disk: type[CachedDisk] = CachedDisk,
    ) -> None:
        super().__init__(dice)
        self._clock = clock
        self._model = model
        self._server = server
        self._class = follower
        used = dice.random.random() < 0.3
        extra = dice.random.choice((0, 0, 4096))
        self.disks = {number: disk(dice, size + extra, used=used) for number, size in enumerate(model.sizes)}
        self.link = StandbyLink(dice, server, self._check_durable)
        self.drains = 0
        self._lent = False
        self._drilling: asyncio.Task[None] | None = None
        self._power_fails = False
        self._alive = False

    def boot(self) -> list[Coroutine[Any, Any, None]]:
        self._power_fails, self._alive = False, True
        for disk in self.disks.values():
            disk.failures = 0
        self.follower = self._class(
            self._server.machine, self.link, self.disks, clock=self._clock, offload=inline, observer=None
        )
        return [self.follower.run()]

    def cut_power(self) -> None:
        self._power_fails = True
        self.kill()

    def died(self) -> None:
        self._alive = False
        if self._drilling is not None:
            self._drilling.cancel()  # its calls die with the process
        if self._power_fails or self.dice.random.random() < 0.5:
            for disk in self.disks.values():
                disk.power_cut()
        for disk in self.disks.values():
            disk.heal()
        self.check()

    async def drill(self, *, lend: bool) -> None:
        """A takeover's part of the standby, given up again; with ``lend`` somebody else writes to the disks."""
        follower, self._drilling = self.follower, asyncio.current_task()
        try:
            with suppress(CdpError, TimeoutError):
                async with asyncio.timeout(25):
                    here = follower.status().applied if self.dice.random.random() < 0.3 else None
                    target = await follower.drain(here)
                    if follower is self.follower and follower.status().state == "drained":
                        self._check_drained(target)
                    if lend:
                        self._lent = True
                        await follower.lend()
                        self._scribble(follower)
                        await asyncio.sleep(self.dice.random.uniform(0.0, 3.0))
        finally:
            self._lent, self._drilling = False, None
            follower.resume()

    def _scribble(self, follower: Follower) -> None:
        if follower is not self.follower:
            return
        for disk in self.disks.values():
            disk.heal()
            disk.write([(0, memoryview(self.dice.random.randbytes(512)))])
            if self.dice.random.random() < 0.5:
                disk.flush()

    # --- invariants -----------------------------------------------------------------------------------------------
    def equals(self, position: Position) -> bool:
        images = self._model.images[position]
        return all(self.disks[number].content.startswith(image) for number, image in enumerate(images))

    def check(self) -> None:
        """At any moment: what a power cut would leave, brought forward from the cursor, is a recovery point; and a
        consistent standby has applied nothing past the last one."""
        if not self._server.up:
            return
        store, machine = self._server.store, self._server.machine
        cursor, point = store.cursor(machine, CONSUMER), store.last_recovery_point(machine)
        if cursor is None or point is None or cursor.generation != store.live(machine).generation:
            return
        self._check_reaches(cursor, point)
        status = self.follower.status()
        applied = status.applied
        if status.consistent and applied is not None and applied.generation == point.generation:
            assert applied <= point, f"{applied.short} was applied, past the recovery point {point.short}"

    def watch(self) -> None:
        """From time to time while the process lives: as ``check``; and consistent means equal."""
        self.check()
        status = self.follower.status()
        whole = not any(disk.failures or disk.die_in is not None for disk in self.disks.values())
        if self._alive and whole and status.consistent and status.applied is not None and not self._lent:
            assert self.equals(status.applied), f"{status.applied.short} is applied, but the disks differ"

    def _check_reaches(self, start: Position, point: Position) -> None:
        """What a power cut would leave now becomes the image at ``point`` if all from ``start`` on is applied to it."""
        path = self._model.path(start, point)
        assert path is not None, f"the cursor {start.short} is not before the recovery point {point.short}"
        for number, image in enumerate(self._model.images[point]):
            left = self.disks[number].survivors()[: len(image)]
            for sealed in path:
                for disk, offset, length, _ in sealed.rows:
                    if disk == number:
                        left[offset : offset + length] = image[offset : offset + length]
            assert left == image, f"disk {number} cannot be brought from {start.short} to {point.short}"

    def _check_durable(self, position: Position) -> None:
        """Before it is acknowledged."""
        if self._server.up:
            store, machine = self._server.store, self._server.machine
            point = store.last_recovery_point(machine)
            if point is not None and store.live(machine).generation == position.generation:
                self._check_reaches(position, point)

    def _check_drained(self, target: Position) -> None:
        self.drains += 1
        sealed = self._model.sealed.get(target)
        assert sealed is None or sealed.header.is_recovery_point, f"drained to {target.short}, no recovery point"
        assert self.equals(target), f"drained to {target.short}, but the disks differ"
        self._check_reaches(target, target)
