"""The person and the process manager around a controller: starts it again whenever it dies, retries what stalls."""

from __future__ import annotations

import asyncio
import contextlib

from journal.errors import CdpError
from standby.takeover.controller import TakeoverController
from standby.takeover.errors import StandbyReset
from standby.takeover.record import Options, TakeoverRecord
from standby.takeover.states import Act, Direction, Mode, State
from tests.takeover.peers import Records, ports
from tests.takeover.world import ADDRESS, COMPARISON_TICKS, Broken, World

LIVES_MAX = 60
"""Lives of the controller until a schedule counts as one that never ends."""


class Operator:
    def __init__(self, world: World, mode: Mode, options: Options | None = None) -> None:
        self.world = world
        self.mode = mode
        self.options = options or Options()
        self.takeover: str | None = None
        self.retries_left = 20
        self.rolls_back = False

    async def until_rest(self) -> TakeoverRecord:
        """Live through kills and stalls until the takeover is at rest; the last record, as it is stored."""
        for _ in range(LIVES_MAX):
            if await self._life():
                assert self.takeover is not None
                return TakeoverRecord.decode(self.world.records[self.takeover])
            self.world.restart()
        raise AssertionError(f"no end after {LIVES_MAX} lives: {self.world.records}")

    async def _life(self) -> bool:
        """One life of the controller; True if the takeover came to rest in it."""
        life = asyncio.create_task(self._serve())
        killed = asyncio.create_task(self.world.killed.wait())
        await asyncio.wait((life, killed), return_when=asyncio.FIRST_COMPLETED)
        rested = life.result() if life.done() else False
        life.cancel()
        killed.cancel()
        await asyncio.wait((life, killed))
        return rested

    async def _serve(self) -> bool:
        ids = iter(f"t{number}" for number in range(len(self.world.records) + 1, 1000))
        rested = False
        try:
            async with TakeoverController(Records(self.world), ports(self.world), lambda: next(ids)) as controller:
                rested = await self._work(controller)
        except* Broken:
            pass  # a record that could not be stored ends the process: that is a kill, too
        return rested

    async def _work(self, controller: TakeoverController) -> bool:
        self.takeover = next(reversed(self.world.records), None)
        while self.takeover is None:
            with contextlib.suppress(CdpError):
                self.takeover = (await controller.take_over(self.world.spec, self.mode, actor="test",
                                                            options=self.options)).id  # fmt: skip
        while True:
            record = await controller.settled(self.takeover)
            dead = not self.world.source.alive
            free = record.direction is Direction.UNDO or record.done(Act.GENERATION_BACK)
            if dead and ((record.stalled is not None and free) or record.state in (State.FAILED, State.ROLLED_BACK)):
                await self._supersede(controller)
            elif record.stalled is not None:
                assert self.retries_left > 0, f"stalled for good: {record.stalled}"
                self.retries_left -= 1
                await asyncio.sleep(5)
                if record.stalled is not None and record.stalled["code"] == StandbyReset.code:
                    self.world.boot_from_disk()
                if record.stalled is not None:
                    await controller.retry(record.id)
            elif record.state is State.RUNNING and self.rolls_back and record.mode is Mode.PLANNED:
                await self._serve_for_a_while()
                await controller.rollback(record.id)
                self.rolls_back = False
            else:
                return True

    async def _supersede(self, controller: TakeoverController) -> None:
        """The source died while it was to get the service back: take over from what is stored."""
        assert self.retries_left > 0, "the dead source is never taken over"
        self.retries_left -= 1
        if self.world.standby.mode == "off":  # the operator starts it
            self.world.standby.mode = "following"
            self.world.follow()
        with contextlib.suppress(CdpError):
            options = Options(source_is_down=True)
            record = await controller.take_over(self.world.spec, Mode.UNPLANNED, actor="test", options=options)
            self.takeover = record.id

    async def _serve_for_a_while(self) -> None:
        for _ in range(10):
            self.world.tick()


def check_end(world: World, record: TakeoverRecord) -> None:
    """What must be true of the world when a takeover is at rest."""
    world.check()
    assert not world.violations
    source, standby = world.source, world.standby
    for _ in range(2 * COMPARISON_TICKS):
        world.tick()
    assert record.active is False and record.stalled is None
    assert all(entry.outcome is not None for entry in record.entries)
    if record.state is State.RUNNING:
        assert world.serves() == "standby", (source, standby)
        assert max(world.generations) == record.generation and str(world.generations[record.generation]) == record.cut
        assert source.fenced or not source.alive or record.options.force
        if record.mode is Mode.PLANNED:
            assert not world.acked - standby.rows, f"lost: {sorted(world.acked - standby.rows)}"
        assert standby.boots_from_disk or record.failed(Act.REDEFINE)
    elif record.state is State.FAILED:
        assert max(world.generations) == record.generation - 1 and standby.mode == "following"
        if source.alive:
            assert world.serves() == "source" and not source.fenced, source
            assert not world.acked - source.written
    else:
        assert record.state is State.ROLLED_BACK
        assert world.serves() == "source" and not source.fenced
        assert max(world.generations) == 3 and world.generations[3] == world.generations[2]
        assert not world.acked - source.written - world.rolled_back_rows
        assert standby.mode == "following" or record.failed(Act.RESTART_STANDBY), standby
    assert ADDRESS in world.spec.service_addresses
