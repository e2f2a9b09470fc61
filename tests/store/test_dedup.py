"""Chunks that another machine has are found and proven; hints that are stale, damaged or of a machine that is gone
cost a miss and nothing else."""

from __future__ import annotations

import threading
import uuid
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3

from cdp.store import ImageReader, Store
from cdp.store.base import CHUNK_BYTES
from cdp.store.chunks import CANDIDATES_MAX, ENTRIES_MAX, ChunkIndex, Collected, Place
from cdp.store.dedup import Dedup, Wanted
from journal import proof
from journal.extent import Kind
from journal.segment import Flags
from tests.store.source import Write, make

CHUNKS = 40
SIZE = CHUNKS * CHUNK_BYTES + 4096


class Pair:
    """A machine with content, its hints, and a new one."""

    def __init__(self, store: Store, directory: Path) -> None:
        self.store = store
        self.now_ns = 1
        self.dedup = Dedup(store, directory, bytes_per_s_max=1e12, refresh_ns=10, clock_ns=lambda: self.now_ns)
        self.first = make(store, SIZE, name="first", seed=1)
        writes: list[Write] = [(0, at, CHUNK_BYTES, Kind.DATA) for at in range(0, 30 * CHUNK_BYTES, CHUNK_BYTES)]
        self.first.put(store, writes)
        self.second = make(store, SIZE, name="second")
        self.key = store.begin_prefill(self.second.machine)

    def refresh(self) -> None:
        self.dedup.refresh(threading.Event())

    def content(self) -> bytes:
        return self.first.images[self.first.position][0]

    def fill(self, content: bytes) -> int:
        return self.dedup.fill(self.second.machine, self.key, 0, wanted(content, bytes.fromhex(self.key)))

    def check(self, laid: bytes) -> None:
        """The second machine's genesis image."""
        self.second.images[self.second.position] = [laid]
        self.store.end_prefill(self.second.machine)
        self.second.check(self.store, self.second.position)


def wanted(content: bytes, key: bytes) -> list[Wanted]:
    found = []
    for number in range(len(content) // CHUNK_BYTES):
        chunk = content[number * CHUNK_BYTES : (number + 1) * CHUNK_BYTES]
        if any(chunk):
            found += [Wanted(*one) for one in proof.entries(proof.entry(number, memoryview(chunk), key))]
    return found


@pytest.fixture
def pair(store: Store, tmp_path: Path) -> Pair:
    return Pair(store, tmp_path / "chunks")


def test_everything_of_an_equal_machine_is_found(pair: Pair) -> None:
    assert pair.fill(pair.content()) == 0
    pair.refresh()
    assert pair.dedup.index.entries() == 30
    assert pair.fill(pair.content()) == 30
    assert pair.fill(pair.content()) == 30, "asking again changes nothing"
    pair.check(pair.content())


def test_content_is_found_wherever_it_lies(pair: Pair) -> None:
    pair.refresh()
    content = pair.content()
    moved = content[7 * CHUNK_BYTES : 8 * CHUNK_BYTES] + bytes(CHUNK_BYTES) + content[: 20 * CHUNK_BYTES]
    assert pair.fill(moved) == 21
    pair.check(moved.ljust(SIZE, b"\0"))


def test_what_was_rewritten_since_is_not_laid(pair: Pair) -> None:
    pair.refresh()
    before = pair.content()
    pair.first.put(pair.store, [(0, 4 * CHUNK_BYTES, CHUNK_BYTES, Kind.DATA), (0, 9 * CHUNK_BYTES, 512, Kind.DATA)])
    assert pair.fill(before) == 28
    laid = bytearray(before)
    for number in (4, 9):
        laid[number * CHUNK_BYTES : (number + 1) * CHUNK_BYTES] = bytes(CHUNK_BYTES)
    pair.check(bytes(laid))
    pair.now_ns += 100
    pair.refresh()
    assert pair.dedup.index.find(np.array([key_of(pair.content(), 4)], np.uint64)) == [
        [Place(pair.first.machine, 0, 4)]
    ]


def test_a_machine_that_is_gone_is_no_source(pair: Pair) -> None:
    pair.refresh()
    pair.store.remove_machine(pair.first.machine)
    assert pair.fill(pair.content()) == 0
    pair.refresh()
    assert not pair.dedup.index
    pair.check(bytes(SIZE))


def test_damage_of_the_source_is_a_miss(tmp_path: Path) -> None:
    with Store.open(tmp_path / "store", file_bytes=1 << 20, map_bytes=64 << 20) as store:
        pair = Pair(store, tmp_path / "chunks")
        pair.refresh()
    for path in (tmp_path / "store" / "segments").iterdir():
        raw = bytearray(path.read_bytes())
        raw[1 << 18 :: 4096] = bytes(byte ^ 0xFF for byte in raw[1 << 18 :: 4096])
        path.write_bytes(raw)
    with Store.open(tmp_path / "store", file_bytes=1 << 20, map_bytes=64 << 20) as store:
        key = store.begin_prefill(pair.second.machine)
        dedup = Dedup(store, tmp_path / "chunks", bytes_per_s_max=1e12)
        laid = dedup.fill(pair.second.machine, key, 0, wanted(pair.content(), bytes.fromhex(key)))
        assert 0 < laid < 30
        store.end_prefill(pair.second.machine)
        with ImageReader(store, pair.second.machine, store.live(pair.second.machine)) as image:
            for at in range(0, CHUNKS * CHUNK_BYTES, CHUNK_BYTES):
                assert image.read(0, at, CHUNK_BYTES) in (bytes(CHUNK_BYTES), pair.content()[at : at + CHUNK_BYTES])


def test_knowing_a_digest_is_not_enough(pair: Pair) -> None:
    pair.refresh()
    honest = wanted(pair.content(), bytes.fromhex(pair.key))
    digests = [blake3(pair.content()[n * CHUNK_BYTES : (n + 1) * CHUNK_BYTES]).digest() for n in range(30)]
    liar = [Wanted(one.number, one.key, digest) for one, digest in zip(honest, digests, strict=True)]
    assert pair.dedup.fill(pair.second.machine, pair.key, 0, liar) == 0
    replayed = wanted(pair.content(), bytes(32))
    assert pair.dedup.fill(pair.second.machine, pair.key, 0, replayed) == 0


def test_a_fuzzy_history_is_read_at_its_last_recovery_point(pair: Pair) -> None:
    pair.refresh()
    before = pair.content()
    pair.first.put(pair.store, [(0, 0, 10 * CHUNK_BYTES, Kind.DATA)], Flags.FUZZY)
    assert pair.fill(before) == 30
    pair.check(before)


def test_hints_survive_a_restart_and_what_is_no_hint_is_deleted(pair: Pair, tmp_path: Path) -> None:
    pair.refresh()
    directory = tmp_path / "chunks"
    (directory / "x.tmp").write_bytes(b"left over")
    (directory / f"{uuid.uuid4()}.chunks").write_bytes(b"CDPCHNK\x01 and too short")
    again = ChunkIndex(directory)
    assert again.machines() == [pair.first.machine]
    assert again.entries() == 30
    assert len(list(directory.iterdir())) == 1
    path = next(directory.iterdir())
    path.write_bytes(path.read_bytes()[:-1])
    assert not ChunkIndex(directory)


def test_a_chunk_has_few_candidates_and_a_machine_a_bounded_number_of_hints(tmp_path: Path) -> None:
    index = ChunkIndex(tmp_path / "chunks")
    keys, places = np.array([7, 7, 3], np.uint64), np.array([1, 2, 1 << 40 | 5], np.uint64)
    machines = [uuid.uuid4() for _ in range(CANDIDATES_MAX + 2)]
    for built_at_ns, machine in enumerate(machines):
        index.replace(machine, keys, places, built_at_ns)
    found = index.find(np.array([3, 4, 7], np.uint64))
    assert found[0] == [Place(machine, 1, 5) for machine in machines[::-1][:CANDIDATES_MAX]]
    assert found[1] == []
    assert [place.number for place in found[2]] == [1] * CANDIDATES_MAX
    collected = Collected()
    digests = np.arange(1, 4 * (1 << 16) + 1, dtype=np.uint64).tobytes()
    while not collected.full:
        collected.add(0, 0, digests)
    collected.add(0, 0, digests)
    assert len(collected.arrays()[0]) == ENTRIES_MAX


def key_of(content: bytes, number: int) -> int:
    chunk = content[number * CHUNK_BYTES : (number + 1) * CHUNK_BYTES]
    return int.from_bytes(blake3(chunk).digest(8), "little")


def test_bodies_are_checked() -> None:
    one = proof.entry(5, memoryview(b"x" * CHUNK_BYTES), bytes(32))
    for wrong in (one[:-1], one + one, one * (proof.ENTRIES_MAX + 1)):
        with pytest.raises(ValueError, match=r"chunk|entries"):
            list(proof.entries(wrong))
