"""One flipped byte in each kind of file, at many places: found by verify, never served, and told with what it costs."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import lmdb
import msgspec
import pytest

from cdp.store import ImageReader, Store, Verified, verify
from cdp.store.check import check_index
from cdp.store.errors import StoredDamage
from journal.extent import Kind
from journal.position import Position
from journal.segment import Flags
from tests.store.source import SCRATCH, SECOND_NS, Source, make
from tests.store.test_damage import flip

SIZES = [512 << 10, 18 << 20]
SECONDS = 14
FLIPS = 6
STEP = 64 << 10


@dataclass(frozen=True)
class Filled:
    """A closed store and what is in it. ``records``: file and used range of each record."""

    directory: Path
    source: Source
    points: list[tuple[int, Position]]
    records: list[tuple[str, int, int]]


@pytest.fixture(scope="module")
def filled() -> Iterator[Filled]:
    scratch = Path(tempfile.mkdtemp(prefix="cdp-flips-", dir=SCRATCH))
    with opened(scratch / "store") as store:
        source = make(store, *SIZES, seed=21)
        for second in range(SECONDS):
            flags = Flags.FUZZY if second == 9 else Flags.NONE
            writes = [row for row in source.random_writes(5) if row[0] == 0]
            # Many short extents, so that there is a run file.
            writes += [
                (1, 2048 * at + 512 * (second % 4), 512, Kind.DISCARD) for at in range(8_500 if second > 5 else 0)
            ]
            source.put(store, writes, flags)
        store.retain(source.machine, keep_ns=10 * SECOND_NS, now_ns=SECONDS * SECOND_NS)
        points = [
            (point.sealed_at_ns, Position.parse(point.position))
            for point in store.recovery_points(source.machine, 0, 2**62).points
        ]
        source.check(store, source.position)
        records = []
        for seq in range(points[0][1].seq + 1, SECONDS + 1):
            entry = store.entry(store.state(source.machine), 1, seq)
            assert entry is not None
            records.append((store.pool.path(entry.file).name, entry.offset, entry.record_bytes))
    compact(scratch / "store" / "index")
    yield Filled(scratch / "store", source, points, records)
    shutil.rmtree(scratch)


def compact(index: Path) -> None:
    """Only live pages: most of a small index is what earlier commits left."""
    copy = index.with_name("compact")
    copy.mkdir()
    with lmdb.open(str(index), readonly=True) as environment:
        environment.copy(str(copy), compact=True)
    (copy / "data.mdb").replace(index / "data.mdb")
    copy.rmdir()


def opened(directory: Path) -> Store:
    return Store.open(directory, file_bytes=1 << 20, map_bytes=64 << 20)


def damaged_copy(filled: Filled, to: Path, kind: str, choose: random.Random) -> None:
    directory = to / "store"
    shutil.copytree(filled.directory, directory)
    if kind == "segments":
        name, start, length = choose.choice(filled.records)
        flip(directory / "segments" / name, start + choose.randrange(length))
        return
    pattern = {
        "image": "base/*/*/0.img",
        "slots": "base/*/*/0.slots",
        "runs": "runs/*/*.run",
        "index": "index/data.mdb",
    }
    path = choose.choice(sorted(directory.glob(pattern[kind])))
    # Bytes that are not zero, mostly: the others are mostly where nothing is.
    used = [at for at, byte in enumerate(path.read_bytes()) if byte]
    flip(path, choose.choice(used) if used else choose.randrange(path.stat().st_size))


@pytest.mark.parametrize("kind", ["segments", "image", "slots", "runs"])
def test_a_flipped_byte_is_found_never_served_and_its_cost_is_exact(filled: Filled, tmp_path: Path, kind: str) -> None:
    for seed in range(FLIPS):
        choose = random.Random(f"{kind}{seed}")
        damaged_copy(filled, tmp_path, kind, choose)
        with opened(tmp_path / "store") as store:
            result = verify(store, filled.source.machine)
            assert len(result.damages) == 1, (seed, result)
            check_served(store, filled, result)
            if kind == "runs":
                assert verify(store, filled.source.machine).clean
        shutil.rmtree(tmp_path / "store")


def check_served(store: Store, filled: Filled, result: Verified) -> None:
    """Every point is right or refused, and refused are exactly those that the damage is said to cost."""
    damage = result.damages[0]
    assert damage.kind == "run" or damage.sentence
    for sealed_at_ns, position in filled.points:
        told = (damage.first_ns or 0) <= sealed_at_ns and (damage.until_ns is None or sealed_at_ns < damage.until_ns)
        assert is_refused(store, filled, position) == told, (position.short, damage)


def is_refused(store: Store, filled: Filled, position: Position) -> bool:
    """Whatever is read is right; is all of it read?"""
    expected = filled.source.images[position][0]
    refused = False
    try:
        with ImageReader(store, filled.source.machine, position) as image:
            for offset, length, is_hole in image.extents(0, 0, len(expected)):
                for at in range(offset, offset + length, STEP):
                    take = min(STEP, offset + length - at)
                    try:
                        content = bytes(take) if is_hole else image.read(0, at, take)
                    except StoredDamage:
                        refused = True
                    else:
                        assert content == expected[at : at + take]
    except StoredDamage:
        return True
    return refused


SCENE = """
import sys
from pathlib import Path
import msgspec
from journal.errors import CdpError
from tests.store.test_flips import opened, told_of
try:
    with opened(Path(sys.argv[1])) as store:
        print(msgspec.json.encode(told_of(store)).decode())
except CdpError as error:
    print(msgspec.json.encode({"refused": error.code}).decode())
"""


def told_of(store: Store) -> dict[str, list[str]]:
    """Whatever somebody can ask the index for."""
    machine = store.list_machines()[0].uuid
    points = store.recovery_points(machine, 0, 2**62).points
    headers = store.headers_after(machine, Position.parse(points[0].position), 1000)
    return {"points": [point.position for point in points], "headers": [header.pack().hex() for header in headers]}


def test_a_flipped_byte_in_the_index_is_found_or_is_where_nothing_is(filled: Filled, tmp_path: Path) -> None:
    """In a process of its own: a damaged page may end its reader."""
    found = 0
    with opened(filled.directory) as store:
        sound = told_of(store)
    for seed in range(2 * FLIPS):
        damaged_copy(filled, tmp_path, "index", random.Random(f"index{seed}"))
        problems = check_index(tmp_path / "store" / "index").problems
        command = [sys.executable, "-c", SCENE, str(tmp_path / "store")]
        done = subprocess.run(command, capture_output=True, check=False, env=dict(os.environ))
        told = msgspec.json.decode(done.stdout) if done.returncode == 0 else {"refused": str(done.returncode)}
        assert problems or told == sound, (seed, told)
        found += bool(problems)
        shutil.rmtree(tmp_path / "store")
    assert found
