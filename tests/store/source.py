"""A machine made of memory: what it writes becomes segments, and the image at every position is known."""

from __future__ import annotations

import random
import uuid
from pathlib import Path

from cdp.store import ImageReader, Store
from journal.encoder import Encoder
from journal.extent import Extents, Kind
from journal.position import Position
from journal.segment import Flags, Header
from journal.wire import DiskInfo

SECOND_NS = 10**9
SCRATCH = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
Write = tuple[int, int, int, int]
"""``(disk, offset, length, kind)``; sorted and free of overlaps within a segment."""


def disk_infos(*sizes: int) -> list[DiskInfo]:
    return [DiskInfo(index=index, name=f"vd{chr(97 + index)}", size_bytes=size) for index, size in enumerate(sizes)]


class Source:
    """``images``: the disks at each position that was ever encoded. ``sealed``: its header and bytes."""

    def __init__(self, machine: uuid.UUID, sizes: list[int], genesis: Position, seed: int = 0) -> None:
        self.machine = machine
        self.sizes = sizes
        self.position = genesis
        self.seconds = 0
        self.images: dict[Position, list[bytes]] = {genesis: [bytes(size) for size in sizes]}
        self.sealed: dict[Position, tuple[Header, bytes]] = {}
        self._encoder = Encoder(machine)
        self._random = random.Random(seed)

    def encode(self, writes: list[Write], flags: Flags = Flags.NONE, *, compressible: bool = True) -> bytes:
        """The next segment after ``position``; ``accept`` makes it the present."""
        disks = [bytearray(image) for image in self.images[self.position]]
        payload = []
        for disk, offset, length, kind in writes:
            if kind == Kind.DATA:
                data = self._random.randbytes(length // 4) * 4 if compressible else self._random.randbytes(length)
                payload.append(data)
            else:
                data = bytes(length)
            disks[disk][offset : offset + length] = data
        header, raw = self._encoder.encode(
            self.position,
            Extents.from_rows(writes),
            payload,
            opened_at_ns=self.seconds * SECOND_NS,
            sealed_at_ns=(self.seconds + 1) * SECOND_NS,
            sealed_monotonic_ns=(self.seconds + 1) * SECOND_NS,
            flags=flags,
        )
        self.images[header.position] = [bytes(disk) for disk in disks]
        self.sealed[header.position] = header, bytes(raw)
        return bytes(raw)

    def accept(self, position: Position) -> None:
        self.position = position
        self.seconds += 1

    def put(self, store: Store, writes: list[Write], flags: Flags = Flags.NONE) -> Position:
        position, duplicate = store.put_segment(self.machine, self.encode(writes, flags))
        assert not duplicate
        self.accept(position)
        return position

    def branch(self, store: Store, parent: Position | None, reason: str = "test") -> Position:
        genesis = store.start_generation(self.machine, parent, reason)
        self.images[genesis] = self.images[parent] if parent is not None else [bytes(size) for size in self.sizes]
        self.position = genesis
        return genesis

    def random_writes(self, count_max: int = 12) -> list[Write]:
        choose = self._random
        writes = []
        for disk, size in enumerate(self.sizes):
            at = 0
            for _ in range(choose.randrange(count_max)):
                at += 512 * choose.randrange(size // 512 // 4 + 1)
                length = 512 * choose.choice([1, 2, 8, 8, 8, 16, choose.randrange(1, size // 512 // 2 + 1)])
                if at + length > size:
                    break
                writes.append((disk, at, length, choose.choice([1, 1, 1, 1, 2, 3])))
                at += length
        return writes

    def check(self, store: Store, position: Position) -> None:
        """The store's image at ``position`` is the one that was written."""
        with ImageReader(store, self.machine, position) as image:
            for disk, expected in enumerate(self.images[position]):
                assert image.read(disk, 0, len(expected)) == expected, f"disk {disk} differs at {position.short}"
                for offset, length, is_hole in image.extents(disk, 0, len(expected)):
                    assert not is_hole or not any(expected[offset : offset + length])


def make(store: Store, *sizes: int, name: str = "db1", seed: int = 0) -> Source:
    machine = store.create_machine(name, disk_infos(*sizes))
    return Source(machine.uuid, list(sizes), store.live(machine.uuid), seed)
