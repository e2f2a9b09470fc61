"""Target disks as they are: loop devices with both sector sizes, against a bytearray."""

from __future__ import annotations

import mmap
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from journal.decoder import decode
from journal.extent import Extents, Kind
from journal.position import Position
from standby.replay.apply import Applier
from standby.replay.device import BlockDisk
from standby.replay.ports import TargetTooSmall
from tests.harness.loop import LoopDisk
from tests.journal.segments import MACHINE, encode_next, random_writes

SIZE = 24 << 20

pytestmark = pytest.mark.real


@pytest.fixture(params=[512, 4096])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BlockDisk]:
    loop = LoopDisk(tmp_path / "disk", SIZE, sector_bytes=request.param)
    disk = BlockDisk(loop.device)
    try:
        assert disk.sector_bytes == request.param
        yield disk
    finally:
        disk.close()
        loop.close()


def test_random_segments_end_equal(disk: BlockDisk) -> None:
    """Every kind of extent at every 512-byte alignment, written over old content."""
    rng = random.Random(disk.sector_bytes)
    model = bytearray(rng.randbytes(SIZE))
    aligned = memoryview(mmap.mmap(-1, SIZE))
    aligned[:] = model
    disk.write([(at, aligned[at : at + (1 << 20)]) for at in range(0, SIZE, 1 << 20)])
    applier = Applier({0: disk})
    tip = Position.genesis(MACHINE, 1, None)
    for _ in range(12):
        header, raw = encode_next(tip, *random_writes(rng, SIZE, 1, 400))
        segment = decode(raw)
        applier.apply(segment)
        applier.apply(segment)
        for _, offset, kind, length, data in segment.writes():
            model[offset : offset + length] = data if kind == Kind.DATA and data else bytes(length)
        tip = header.position
    applier.flush()
    assert bytes(disk.read(0, SIZE)) == bytes(model)
    assert bytes(disk.read(512 * 7, 512 * 33)) == bytes(model[512 * 7 : 512 * 40])
    assert disk.size_bytes == SIZE


def test_a_run_longer_than_the_window(disk: BlockDisk) -> None:
    rng = random.Random(2)
    payload = rng.randbytes((9 << 20) + 512)
    rows = [(0, 512, 512, int(Kind.DATA)), (0, 1024, len(payload) - 512, int(Kind.DATA))]
    segment = decode(encode_next(Position.genesis(MACHINE, 1, None), Extents.from_rows(rows), payload)[1])
    Applier({0: disk}).apply(segment)
    assert bytes(disk.read(0, len(payload) + 1024)) == bytes(512) + payload + bytes(512)


def test_nothing_is_written_to_a_disk_that_is_too_small(disk: BlockDisk) -> None:
    rows = [(0, 0, 512, int(Kind.DATA)), (0, SIZE, 512, int(Kind.DATA))]
    segment = decode(encode_next(Position.genesis(MACHINE, 1, None), Extents.from_rows(rows), b"x" * 1024)[1])
    with pytest.raises(TargetTooSmall):
        Applier({0: disk}).apply(segment)
    assert not any(disk.read(0, 512))
