"""Many threads at once: writers of several machines, readers of any second, retention, and the background work."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

from cdp.store import ImageReader, Store, verify
from cdp.store.base import BaseImage
from cdp.store.errors import UnknownPosition
from cdp.store.files import OsFiles
from journal.extent import Kind
from journal.position import Position
from tests.store.source import Source, make

SECONDS = 250


def test_large_segments_of_several_machines_at_once(tmp_path: Path) -> None:
    """The first of them has a thread that writes for it, the others write by themselves."""
    with Store.open(tmp_path / "store", file_bytes=16 << 20) as store:
        sources = [make(store, 4 << 20, name=f"db{n}", seed=n) for n in range(4)]

        def write(source: Source) -> None:
            for second in range(4):
                source.put(store, [(0, second << 16, 3 << 20, Kind.DATA)])

        with ThreadPoolExecutor(len(sources)) as pool:
            list(pool.map(write, sources))
        for source in sources:
            for position in source.sealed:
                source.check(store, position)
            assert verify(store, source.machine).clean


def test_writers_readers_and_retention_at_once(tmp_path: Path) -> None:
    done = Event()
    with Store.open(tmp_path / "store", file_bytes=256 << 10, spares_max=2, flush_interval_s=0.002) as store:
        sources = [make(store, 128 << 10, name=f"db{n}", seed=n) for n in range(3)]

        def write(source: Source) -> None:
            for _ in range(SECONDS):
                source.put(store, source.random_writes(5))

        def read(seed: int) -> int:
            choose = random.Random(seed)
            checked = 0
            while not done.is_set():
                source = choose.choice(sources)
                points = store.recovery_points(source.machine, 0, 2**63).points
                if not points:
                    continue
                position = Position.parse(choose.choice(points).position)
                try:
                    source.check(store, position)
                    store.headers_after(source.machine, position, 10)
                    assert store.position_at(source.machine, 2**62) in source.images
                except UnknownPosition:
                    # Folded since it was listed: then the oldest point must be newer.
                    oldest = store.recovery_points(source.machine, 0, 2**63).points[0]
                    assert Position.parse(oldest.position) > position
                checked += 1
            return checked

        def retain() -> int:
            folded = 0
            while not done.is_set():
                for source in sources:
                    folded += store.retain(source.machine, keep_bytes=300 << 10).segments
                done.wait(0.01)
            return folded

        with ThreadPoolExecutor(8) as pool:
            readers = [pool.submit(read, seed) for seed in range(3)]
            keeper = pool.submit(retain)
            writers = [pool.submit(write, source) for source in sources]
            try:
                for writer in writers:
                    writer.result()
            finally:
                done.set()
            assert sum(reader.result() for reader in readers) > 10
            assert keeper.result() > 10
        for source in sources:
            assert store.live(source.machine) == source.position
            assert verify(store, source.machine).clean
            source.check(store, source.position)


def test_one_reader_may_be_shared_by_threads(store: Store) -> None:
    source = make(store, 1 << 20, seed=8)
    for _ in range(30):
        source.put(store, source.random_writes(30))
    expected = source.images[source.position][0]
    with ImageReader(store, source.machine, source.position) as image, ThreadPoolExecutor(6) as pool:
        ranges = [(at, 20_000) for at in range(0, 1_000_000, 9_999)] * 3
        for (at, length), data in zip(ranges, pool.map(lambda r: image.read(0, *r), ranges), strict=True):
            assert data == expected[at : at + length]


def test_a_base_image_can_be_read_while_it_is_being_made(tmp_path: Path) -> None:
    class Reading(OsFiles):
        """Between the first file of a disk and the second one comes a reader."""

        seen: list[bytes]

        def create_sparse(self, path: Path, size_bytes: int) -> None:
            super().create_sparse(path, size_bytes)
            content = memoryview(bytearray(4096))
            base.read_into(0, 0, content)
            self.seen.append(bytes(content))
            assert [hole for _, _, hole in base.extents(0, 0, 1 << 20)] == [True]

    files = Reading()
    files.seen = []
    base = BaseImage(files, tmp_path / "base")
    base.prepare(0, 1 << 20)
    assert files.seen == [bytes(4096)] * 2
