"""A process that is killed and started again."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

from tests.sim.faults import Dice, Died


class Process(ABC):
    def __init__(self, dice: Dice) -> None:
        self.dice = dice
        self._kill = asyncio.Event()
        self.deaths = 0

    @abstractmethod
    def boot(self) -> list[Coroutine[Any, Any, None]]:
        """Begin from what is durable; the tasks of the new process. May raise ``Died``."""

    @abstractmethod
    def died(self) -> None:
        """What becomes of the disks, right after the death."""

    def kill(self) -> None:
        self._kill.set()

    async def live(self) -> None:
        """Until cancelled."""
        while True:
            self._kill.clear()
            with suppress(Died):
                await self._until_dead(self.boot())
            self.deaths += 1
            self.died()
            await asyncio.sleep(self.dice.random.choice((0.0, 0.3, 2.0)))

    async def _until_dead(self, work: list[Coroutine[Any, Any, None]]) -> None:
        tasks = [asyncio.ensure_future(coroutine) for coroutine in work]
        killed = asyncio.ensure_future(self._kill.wait())
        try:
            await asyncio.wait([*tasks, killed], return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended = [task for task in tasks if task.done()]
            for task in (*tasks, killed):
                task.cancel()
            await asyncio.gather(*tasks, killed, return_exceptions=True)
        for task in ended:
            task.result()
