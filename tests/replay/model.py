"""A machine's history in memory, served as the server would serve it, and disks in memory.

They stand at the engine's ports so that a test decides what follows what and what breaks when.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence

from blake3 import blake3

from journal.decoder import decode
from journal.errors import CdpError
from journal.extent import Extents, Kind
from journal.position import Position
from journal.segment import Flags, Header
from journal.wire import DiskInfo, FeedAnswer, FeedEntry, MachineState
from standby.replay.ports import ServerUnreachable, T, Until
from tests.journal.segments import MACHINE, encode_next, random_writes

SIZE = 3 << 20


class MemoryDisk:
    """Like a block device, with a size that can be changed."""

    def __init__(self, size_bytes: int = SIZE, fill: int = 0) -> None:
        self.data = bytearray([fill]) * size_bytes
        self.flushes = 0

    @property
    def size_bytes(self) -> int:
        return len(self.data)

    def write(self, writes: Sequence[tuple[int, memoryview]]) -> None:
        for offset, data in writes:
            assert offset + len(data) <= len(self.data)
            self.data[offset : offset + len(data)] = data

    def zero(self, offset: int, length: int) -> None:
        assert offset + length <= len(self.data)
        self.data[offset : offset + length] = bytes(length)

    discard = zero

    def read(self, offset: int, length: int) -> memoryview:
        return memoryview(bytes(self.data[offset : offset + length]))

    def flush(self) -> None:
        self.flushes += 1


class History:
    """``ports.Transport`` over segments in memory. ``images`` keeps every position's disks."""

    def __init__(self, disks: int = 2, size_bytes: int = SIZE) -> None:
        self.infos = [DiskInfo(index=index, name=f"disk{index}", size_bytes=size_bytes) for index in range(disks)]
        self.genesis = Position.genesis(MACHINE, 1, None)
        self.live: list[Position] = [self.genesis]
        self.segments: dict[Position, bytearray] = {}
        self.headers: dict[Position, Header] = {}
        self.images: dict[Position, list[bytes]] = {self.genesis: [bytes(size_bytes) for _ in self.infos]}
        self.stored_cursor: Position | None = None
        self.faults: Callable[[str], None] = lambda _call: None
        self.served: list[str] = []
        self.changed = asyncio.Event()

    @property
    def tip(self) -> Position:
        return self.live[-1]

    @property
    def recovery_point(self) -> Position | None:
        return next((at for at in reversed(self.live) if at in self.headers and self._point(at)), None)

    def write(self, extents: Extents, payload: bytes = b"", flags: Flags = Flags.NONE) -> Position:
        header, raw = encode_next(self.tip, extents, payload, flags=flags, second=self.tip.seq + 1)
        image = [bytearray(disk) for disk in self.images[self.tip]]
        for disk, offset, kind, length, data in decode(raw).writes():
            image[disk][offset : offset + length] = data if kind == Kind.DATA and data else bytes(length)
        self.images[header.position] = [bytes(disk) for disk in image]
        self.headers[header.position] = header
        self.segments[header.position] = raw
        self.live.append(header.position)
        self.changed.set()
        return header.position

    def write_random(self, rng: random.Random, flags: Flags = Flags.NONE) -> Position:
        return self.write(*random_writes(rng, len(self.images[self.tip][0]), len(self.infos), 40), flags)

    def start_generation(self, parent: Position) -> None:
        """The next generation, on top of a position of the live history."""
        self.live = self.live[: self.live.index(parent) + 1]
        genesis = Position.genesis(MACHINE, parent.generation + 1, parent)
        self.images[genesis] = self.images[parent]
        self.live.append(genesis)
        self.changed.set()

    # --- ports.Transport ------------------------------------------------------------------------------------------
    async def state(self) -> MachineState:
        await self._serve("state")
        return MachineState(
            machine=str(MACHINE),
            name="model",
            generation=self.tip.generation,
            tip=str(self.tip),
            recovery_point=str(self.recovery_point) if self.recovery_point else None,
            fuzzy=self.tip != self.recovery_point,
            fenced=False,
            disks=self.infos,
        )

    async def feed(self, after: Position, until: Until, wait_s: float) -> FeedAnswer:
        await self._serve("feed")
        while True:
            self.changed.clear()
            if after not in self.live:
                return FeedAnswer(entries=[], tip=str(self.tip), restart=True)
            point = self.recovery_point
            rest = [at for at in self.live[self.live.index(after) + 1 :] if at in self.headers]
            if until == "recovery-point":
                rest = [at for at in rest if point is not None and at <= point]
            if rest:
                return FeedAnswer(entries=[self._entry(at) for at in rest[:7]], tip=str(self.tip))
            try:
                await asyncio.wait_for(self.changed.wait(), min(wait_s, 0.5))
            except TimeoutError:
                return FeedAnswer(entries=[], tip=str(self.tip))

    async def segment(self, position: Position) -> bytearray:
        await self._serve("segment")
        return self.segments[position]

    async def image(self, at: Position, disk: int, offset: int, length: int) -> bytearray:
        await self._serve("image")
        content = self.images[at][disk][offset : offset + length]
        rows = []
        payload = bytearray()
        for start in range(0, len(content), 4096):
            block = content[start : start + 4096]
            if any(block):
                rows.append((disk, offset + start, len(block), int(Kind.DATA)))
                payload += block
        base = Position(at.generation, 0, at.digest)
        return encode_next(base, Extents.from_rows(rows), bytes(payload))[1]

    async def hashes(self, disk: int, offset: int, length: int, chunk: int) -> bytes:
        await self._serve("hashes")
        content = self.images[self.tip][disk][offset : offset + length]
        chunks = [content[start : start + chunk] for start in range(0, len(content), chunk)]
        return b"".join(blake3(part).digest() if any(part) else bytes(32) for part in chunks)

    async def cursor(self) -> Position | None:
        await self._serve("cursor")
        return self.stored_cursor

    async def ack(self, position: Position) -> None:
        await self._serve("ack")
        self.stored_cursor = position

    async def forget(self) -> None:
        await self._serve("forget")
        self.stored_cursor = None

    async def _serve(self, call: str) -> None:
        self.served.append(call)
        await asyncio.sleep(0)
        self.faults(call)

    def _point(self, at: Position) -> bool:
        return self.headers[at].is_recovery_point

    def _entry(self, at: Position) -> FeedEntry:
        header = self.headers[at]
        return FeedEntry(
            position=str(at),
            segment_bytes=header.segment_bytes,
            sealed_at_ns=header.sealed_at_ns,
            recovery_point=header.is_recovery_point,
        )


class FastClock:
    """Pauses take one turn of the loop."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        await asyncio.sleep(0)


def inline(work: Callable[[], T]) -> Awaitable[T]:
    """``Offload`` without threads: the order of everything depends on the test alone."""

    async def run() -> T:
        await asyncio.sleep(0)
        return work()

    return run()


def unreachable() -> CdpError:
    return ServerUnreachable("The model's network is down.", remedy="Wait.")
