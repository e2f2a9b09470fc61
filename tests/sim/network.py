"""The network between the processes: requests and answers are lost, late, reordered and damaged."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from cdp.agent.errors import ServerUnreachable as AgentUnreachable
from journal import wire
from journal.errors import CdpError
from journal.position import Position
from standby.replay.ports import ServerUnreachable, T, Until
from tests.sim.faults import Dice
from tests.sim.server import Away, Server


class Link:
    """One peer's way to the server."""

    def __init__(self, dice: Dice, server: Server, unreachable: Callable[[str], CdpError]) -> None:
        self._dice = dice
        self._server = server
        self._unreachable = unreachable
        self.cut_until = 0.0

    async def ask(self, handler: Callable[[], Awaitable[T]]) -> T:
        dice = self._dice
        await self._travel("request-late")
        if dice.happens("request-lost") or self._cut:
            await asyncio.sleep(dice.random.choice((0.0, 0.5, 5.0)))
            raise self._unreachable("the request was lost")
        try:
            answer = await self._server.serve(handler)
        except Away:
            raise self._unreachable("the server is away") from None
        except CdpError as error:
            await self._travel("answer-late")
            wire.raise_remote(error.as_dict())
            raise
        await self._travel("answer-late")
        if dice.happens("answer-lost") or self._cut:
            await asyncio.sleep(dice.random.choice((0.0, 0.5, 5.0)))
            raise self._unreachable("the answer was lost")
        return answer

    @property
    def _cut(self) -> bool:
        return not self._dice.calm and asyncio.get_running_loop().time() < self.cut_until

    async def _travel(self, late: str) -> None:
        seconds = self._dice.random.expovariate(200.0)
        if self._dice.happens(late):
            seconds += self._dice.random.uniform(0.2, 4.0)
        await asyncio.sleep(seconds)


class AgentLink(Link):
    """``cdp.agent.push.Server``. ``damaged``: bodies that arrived otherwise than they were sent."""

    def __init__(self, dice: Dice, server: Server) -> None:
        super().__init__(dice, server, AgentUnreachable)
        self.machine = server.machine
        self.damaged = 0

    async def state(self) -> wire.MachineState:
        return await self.ask(self._server.state)

    async def put_segment(self, position: Position, path: Path, length: int) -> wire.StoredAnswer:
        raw = bytearray(path.read_bytes())
        assert len(raw) == length
        if self._dice.happens("request-damaged"):
            self.damaged += 1
            raw = bytearray(damage(self._dice, raw))
        return await self.ask(lambda: self._server.put(position, raw))

    async def lost(self, position: Position) -> None:
        raise AssertionError(f"the store does not know {position.short} any more, which it has acknowledged")


class StandbyLink(Link):
    """``standby.replay.ports.Transport``. ``durable_at`` is asked before each acknowledgement leaves."""

    def __init__(self, dice: Dice, server: Server, durable_at: Callable[[Position], None]) -> None:
        super().__init__(dice, server, ServerUnreachable)
        self._durable_at = durable_at
        self._seed_pause_s = dice.random.choice((0.0, 1.0, 6.0))
        """A long seed: the history goes on meanwhile."""

    async def state(self) -> wire.MachineState:
        return await self.ask(self._server.state)

    async def feed(self, after: Position, until: Until, wait_s: float) -> wire.FeedAnswer:
        return await self.ask(lambda: self._server.follow(after, until, wait_s))

    async def segment(self, position: Position) -> bytes:
        return self._maybe_damaged(await self.ask(lambda: self._server.segment(position)))

    async def image(self, at: Position, disk: int, offset: int, length: int) -> bytes:
        return self._maybe_damaged(await self.ask(lambda: self._server.image(at, disk, offset, length)))

    async def hashes(self, disk: int, offset: int, length: int, chunk: int) -> bytes:
        await asyncio.sleep(self._dice.random.uniform(0.0, self._seed_pause_s))
        return await self.ask(lambda: self._server.hashes(disk, offset, length, chunk))

    async def cursor(self) -> Position | None:
        return await self.ask(self._server.cursor)

    async def ack(self, position: Position) -> None:
        self._durable_at(position)
        await self.ask(lambda: self._server.set_cursor(position))

    async def forget(self) -> None:
        await self.ask(lambda: self._server.set_cursor(None))

    def _maybe_damaged(self, raw: bytes) -> bytes:
        return damage(self._dice, raw) if self._dice.happens("answer-damaged") else raw


def damage(dice: Dice, raw: bytes | bytearray) -> bytes:
    """Truncated, or with one bit flipped."""
    if dice.random.random() < 0.5:
        return bytes(raw[: dice.random.randrange(len(raw))])
    flipped = bytearray(raw)
    flipped[dice.random.randrange(len(raw))] ^= 1 << dice.random.randrange(8)
    return bytes(flipped)
