"""Asking what the server has: everything once, no zeros, in bounded requests; a sample first where there is much; and
an end of it whatever happens."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from blake3 import blake3

from cdp.agent.dedup import SAMPLE, SAMPLE_FROM_CHUNKS, Asker, settled_state
from cdp.agent.dirty import Geometry
from cdp.agent.errors import ServerUnreachable
from cdp.agent.status import Status
from journal import proof, wire
from journal.errors import BadRequest, CdpError, PrefillRestarted
from journal.proof import CHUNK_BYTES

KEY = bytes(range(32))


class MemoryServer:
    """Has every chunk in ``known``, by digest. ``faults``: what the next requests for chunks raise, in order."""

    def __init__(self, known: set[int]) -> None:
        self.known = known
        self.asked: list[tuple[int, int, bytes]] = []
        self.requests = 0
        self.begun = self.ended = 0
        self.faults: list[CdpError | None] = []

    async def state(self) -> wire.MachineState:
        return wire.MachineState(
            machine="",
            name="db1",
            generation=1,
            tip="",
            recovery_point=None,
            fuzzy=True,
            fenced=False,
            disks=[],
            prefill="filled" if self.ended else "open",
        )

    async def begin_prefill(self) -> bytes:
        self.begun += 1
        self.asked.clear()
        return KEY

    async def prefill(self, key: bytes, disk: int, body: bytes) -> int:
        self.requests += 1
        assert key == KEY
        if self.faults and (fault := self.faults.pop(0)) is not None:
            raise fault
        rows = list(proof.entries(body))
        assert rows
        self.asked += [(disk, number, told) for number, _, told in rows]
        return sum(hint in self.known for _, hint, _ in rows)

    async def end_prefill(self) -> wire.PrefillEnded:
        self.ended += 1
        return wire.PrefillEnded(prefill="filled")


@pytest.fixture
def worker() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as made:
        yield made


def asker(server: MemoryServer, paths: list[Path], worker: ThreadPoolExecutor) -> tuple[Asker, Status]:
    status = Status(boot_id="boot")
    disks = [Geometry(index, path.stat().st_size, 64 << 10) for index, path in enumerate(paths)]
    made = Asker(server, disks, dict(enumerate(paths)), status=status, worker=worker, bytes_per_s_max=0)
    return made, status


def disk(path: Path, chunks: int, share: float, tail: int = 0) -> dict[int, bytes]:
    """A disk of so many chunks, a share of them not zeros, and a shorter last one; what should be asked for."""
    choose = random.Random(path.name)
    content = [choose.randbytes(CHUNK_BYTES) if choose.random() < share else bytes(CHUNK_BYTES) for _ in range(chunks)]
    path.write_bytes(b"".join(content) + choose.randbytes(tail))
    return {number: chunk for number, chunk in enumerate(content) if any(chunk)}


async def test_every_chunk_is_asked_for_once_with_its_proof(tmp_path: Path, worker: ThreadPoolExecutor) -> None:
    first = disk(tmp_path / "a", 1200, 0.9, tail=4096)
    second = disk(tmp_path / "b", 100, 0.1)
    server = MemoryServer(set())
    made, status = asker(server, [tmp_path / "a", tmp_path / "b"], worker)
    await made.run()
    wanted = {(0, number): chunk for number, chunk in first.items()} | {(1, n): chunk for n, chunk in second.items()}
    assert [row[:2] for row in server.asked] == sorted(wanted)
    assert all(told == blake3(wanted[at, number], key=KEY).digest() for at, number, told in server.asked)
    assert server.requests <= 4
    assert (server.begun, server.ended) == (1, 1)
    assert status.progress is None


async def test_where_a_sample_finds_nothing_no_more_is_read(tmp_path: Path, worker: ThreadPoolExecutor) -> None:
    path = tmp_path / "large"
    step = SAMPLE_FROM_CHUNKS // SAMPLE * CHUNK_BYTES
    with path.open("wb") as file:
        file.truncate(SAMPLE_FROM_CHUNKS * CHUNK_BYTES)
        for number in range(20):
            file.seek(number * step)
            file.write(random.Random(number).randbytes(CHUNK_BYTES))
    server = MemoryServer(set())
    await asker(server, [path], worker)[0].run()
    assert (server.requests, len(server.asked), server.ended) == (1, 20, 1)
    known = {int.from_bytes(blake3(random.Random(7).randbytes(CHUNK_BYTES)).digest(8), "little")}
    server = MemoryServer(known)
    await asker(server, [path], worker)[0].run()
    assert len(server.asked) == 40, "one is known: everything is asked for"


async def test_a_lost_answer_is_asked_for_again_and_a_lost_beginning_is_told(
    tmp_path: Path, worker: ThreadPoolExecutor
) -> None:
    chunks = disk(tmp_path / "a", 40, 1.0)
    server = MemoryServer(set())
    server.faults = [ServerUnreachable("away"), ServerUnreachable("away"), None]
    await asker(server, [tmp_path / "a"], worker)[0].run()
    assert len(server.asked) == len(chunks)
    assert server.ended == 1

    server = MemoryServer(set())
    server.faults = [PrefillRestarted("the server was restarted")]
    made, _ = asker(server, [tmp_path / "a"], worker)
    with pytest.raises(PrefillRestarted):
        await made.run()
    assert server.ended == 0
    await made.run()
    assert (server.begun, server.ended, len(server.asked)) == (2, 1, len(chunks))


async def test_what_cannot_be_helped_ends_the_asking_and_not_the_seed(
    tmp_path: Path, worker: ThreadPoolExecutor
) -> None:
    disk(tmp_path / "a", 40, 1.0)
    server = MemoryServer(set())
    server.faults = [BadRequest("no")]
    await asker(server, [tmp_path / "a"], worker)[0].run()
    assert server.ended == 1


async def test_a_history_never_begins_on_an_open_prefill() -> None:
    server = MemoryServer(set())
    assert (await settled_state(server)).prefill == "filled"
    assert (await settled_state(server)).prefill == "filled"
    assert server.ended == 1
