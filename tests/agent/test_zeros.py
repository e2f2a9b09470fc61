"""Zeros of the disks are never sent as bytes: a seed leaves them out, a resync and a comparison send ranges. And a copy
takes no more of a limited line than the journal leaves."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from blake3 import blake3

from cdp.agent.copy import BUFFER_BYTES, CHUNK_BYTES, FINE_BYTES
from cdp.agent.dirty import DirtyMap, Geometry, Round, RoundKind
from cdp.agent.rounds import Rounds
from journal.extent import Kind
from journal.position import Position

BLOCK = 4096
SIZE = 6 * CHUNK_BYTES + 3 * BLOCK
DISK = Geometry(0, SIZE, 64 << 10)
TIP = Position.genesis(uuid.UUID(int=1), 1, None)


class Server:
    """What the server holds, and what it was asked."""

    def __init__(self, image: bytes) -> None:
        self.image = image
        self.asked: list[tuple[int, int]] = []

    async def hashes(self, disk: int, offset: int, length: int, chunk: int) -> list[bytes]:
        assert disk == 0
        self.asked.append((offset, chunk))
        parts = [self.image[at : min(at + chunk, offset + length)] for at in range(offset, offset + length, chunk)]
        return [blake3(part).digest() if any(part) else bytes(32) for part in parts]


class NoLosses:
    def stamps(self, disk: int) -> npt.NDArray[np.uint64]:
        return np.zeros(DISK.granules, np.uint64)


@pytest.fixture
def worker() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as made:
        yield made


def content(seed: int, share: float) -> bytes:
    """Blocks of which this share is not zeros."""
    choose = random.Random(seed)
    return b"".join(choose.randbytes(BLOCK) if choose.random() < share else bytes(BLOCK) for _ in range(SIZE // BLOCK))


def rounds_of(path: Path, server: Server, worker: ThreadPoolExecutor, rate: float | None = None) -> Rounds:
    async def settled(_: int) -> None:
        return

    return Rounds(
        [DISK],
        {0: path},
        losses=NoLosses(),
        hashes=server,
        settled=settled,
        stored=lambda: TIP,
        started=lambda _: None,
        worker=worker,
        bytes_per_s_max=0,
        sending=lambda: rate,
    )


async def reading(rounds: Rounds, kind: RoundKind) -> None:
    todo = DirtyMap([DISK])
    todo.mark_all()
    rounds.begin(Round(kind=kind, reason="test", drop_generation=0, todo=todo.pack(), complete=True, total_bytes=SIZE))
    while not rounds.reading:
        rounds.at_cut(TIP, 0, time.monotonic_ns(), complete=True)
        await asyncio.sleep(0)


async def copied(rounds: Rounds, kind: RoundKind, image: bytes) -> tuple[bytes, int, int]:
    """``image`` with the copy laid over it; bytes sent as data, and ranges sent as zeros."""
    await reading(rounds, kind)
    result, data, zeros = bytearray(image), 0, 0
    while rounds.current is not None:
        await rounds.read_until(time.monotonic() + 60)
        copier = rounds.copier
        assert copier is not None
        pieces = copier.take()
        rows = zip(pieces.starts.tolist(), pieces.ends.tolist(), pieces.kinds, pieces.source_offsets, strict=True)
        for start, end, piece, source in rows:
            if piece == Kind.DATA:
                result[start:end] = copier.buffer[source : source + end - start].tobytes()
                data += end - start
                assert all(any(result[at : at + BLOCK]) for at in range(start, end, BLOCK)), "zeros were sent"
            else:
                assert piece == Kind.ZERO
                result[start:end] = bytes(end - start)
                zeros += end - start
        rounds.at_cut(TIP, 0, time.monotonic_ns(), complete=True)
    return bytes(result), data, zeros


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
async def test_a_seed_leaves_zeros_out(tmp_path: Path, worker: ThreadPoolExecutor, share: float) -> None:
    ours = content(1, share)
    (tmp_path / "disk").write_bytes(ours)
    result, data, zeros = await copied(rounds_of(tmp_path / "disk", Server(b""), worker), "seed", bytes(SIZE))
    assert result == ours
    assert zeros == 0
    assert data == sum(BLOCK for at in range(0, SIZE, BLOCK) if any(ours[at : at + BLOCK]))


async def test_a_resync_sends_zeros_as_ranges(tmp_path: Path, worker: ThreadPoolExecutor) -> None:
    ours = content(2, 0.3)
    (tmp_path / "disk").write_bytes(ours)
    result, data, zeros = await copied(rounds_of(tmp_path / "disk", Server(b""), worker), "resync", b"\xff" * SIZE)
    assert result == ours
    assert data + zeros == SIZE


async def test_a_comparison_sends_neither_equal_zeros_nor_new_ones_as_bytes(
    tmp_path: Path, worker: ThreadPoolExecutor
) -> None:
    """By MiB: zeros on both sides, zeros here, zeros there, equal content, one block that differs, much that does."""
    full, other = content(3, 1.0), content(4, 1.0)
    empty = bytes(CHUNK_BYTES)
    ours, theirs = bytearray(), bytearray()
    for number, (here, there) in enumerate([(empty, empty), (empty, full), (full, empty), (full, full)]):
        low = number * CHUNK_BYTES
        ours += here[low : low + CHUNK_BYTES] or empty
        theirs += there[low : low + CHUNK_BYTES] or empty
    ours += full[len(ours) : SIZE]
    theirs += full[len(theirs) : SIZE]
    theirs[4 * CHUNK_BYTES : 4 * CHUNK_BYTES + BLOCK] = bytes(BLOCK)
    theirs[5 * CHUNK_BYTES : 6 * CHUNK_BYTES] = other[5 * CHUNK_BYTES : 6 * CHUNK_BYTES]
    (tmp_path / "disk").write_bytes(ours)
    server = Server(bytes(theirs))
    result, data, zeros = await copied(rounds_of(tmp_path / "disk", server, worker), "compare", bytes(theirs))
    assert result == bytes(ours)
    assert zeros == CHUNK_BYTES
    assert data == CHUNK_BYTES + FINE_BYTES + CHUNK_BYTES
    fine = [offset // CHUNK_BYTES for offset, chunk in server.asked if chunk == FINE_BYTES]
    assert fine == [1, 4, 5], "what is zeros there needs no closer look"


async def test_a_copy_takes_what_the_journal_leaves(tmp_path: Path, worker: ThreadPoolExecutor) -> None:
    (tmp_path / "disk").write_bytes(content(5, 1.0))
    free = rounds_of(tmp_path / "disk", Server(b""), worker)
    assert not free.gives_way(1 << 40)
    await reading(free, "seed")
    await free.read_until(time.monotonic() + 60)
    assert free.copier is not None
    assert free.copier.take().ends.max() == SIZE <= BUFFER_BYTES
    free.abandon()

    limited = rounds_of(tmp_path / "disk", Server(b""), worker, rate=4.5e6)
    assert limited.gives_way(2_300_000)
    assert not limited.gives_way(2_200_000)
    await reading(limited, "seed")
    await limited.read_until(time.monotonic() + 60)
    assert limited.copier is not None
    assert limited.copier.take().ends.max() == 2 * CHUNK_BYTES
    limited.abandon()

    slow = rounds_of(tmp_path / "disk", Server(b""), worker, rate=64e3)
    await reading(slow, "seed")
    await slow.read_until(time.monotonic() + 60)
    assert slow.copier is not None
    assert slow.copier.take().ends.max() == CHUNK_BYTES, "it goes on, however slowly"
    slow.abandon()
