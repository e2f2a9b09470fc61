"""Reflinks: equal chunks of base images take their space once, where the filesystem can do it, and only equal ones."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cdp.store import Store
from cdp.store.base import CHUNK_BYTES
from cdp.store.dedup import Dedup
from journal.extent import Kind
from tests.harness.loop import LoopDisk, scratch_dir
from tests.harness.process import run
from tests.store.source import Write, make
from tests.store.test_dedup import wanted

pytestmark = [pytest.mark.real, pytest.mark.timeout(150)]

CHUNKS = 64
SIZE = CHUNKS * CHUNK_BYTES
DISK_BYTES = 512 << 20


@pytest.fixture(params=["xfs", "btrfs"])
def mounted(request: pytest.FixtureRequest) -> Iterator[Path]:
    directory = scratch_dir("cdp-share-")
    point = directory / "mounted"
    point.mkdir()
    disk = LoopDisk(directory / "disk.img", DISK_BYTES)
    try:
        run([f"mkfs.{request.param}", "-q", "-f", str(disk.device)])
        run(["mount", str(disk.device), str(point)])
        try:
            yield point
        finally:
            run(["umount", str(point)])
    finally:
        disk.close()
        shutil.rmtree(directory)


def test_equal_chunks_are_stored_once(mounted: Path) -> None:
    with Store.open(mounted / "store", file_bytes=16 << 20, map_bytes=64 << 20) as store:
        dedup = Dedup(store, mounted / "chunks", bytes_per_s_max=1e12)
        first = make(store, SIZE, name="first", seed=1)
        writes: list[Write] = [(0, at, CHUNK_BYTES, Kind.DATA) for at in range(0, SIZE, CHUNK_BYTES)]
        first.put(store, writes)
        store.retain(first.machine, keep_ns=0, now_ns=10**18)
        # What is newer than the base image lies elsewhere: that chunk is found, but cannot be shared.
        first.put(store, [(0, 20 * CHUNK_BYTES, CHUNK_BYTES, Kind.DATA)])
        dedup.refresh(threading.Event())
        content = first.images[first.position][0]

        second = make(store, SIZE, name="second")
        key = store.begin_prefill(second.machine)
        assert dedup.fill(second.machine, key, 0, wanted(content, bytes.fromhex(key))) == CHUNKS
        store.end_prefill(second.machine)
        second.images[second.position] = [content]
        second.check(store, second.position)
        first.check(store, first.position)

        path = store.base_path(second.machine, 0)
        shared = sum(line.count("shared") for line in run(["filefrag", "-v", str(path)]).splitlines())
        assert shared > 0
        assert CHUNKS - 16 <= dedup.shared_bytes // CHUNK_BYTES < CHUNKS

        # They part as soon as one is written to.
        second.put(store, [(0, 0, 512, Kind.DATA), (0, CHUNK_BYTES, CHUNK_BYTES, Kind.ZERO)])
        store.retain(second.machine, keep_ns=0, now_ns=10**18)
        second.check(store, second.position)
        first.check(store, first.position)
