"""A quarter of an hour of history, in the large: index spilled and merged, bit for bit right, rebuilt if it is lost."""

from __future__ import annotations

import random
import shutil
import time
import uuid
from pathlib import Path

from cdp.store import ImageReader, Store
from journal.position import Position
from journal.wire import DiskInfo
from tests.harness.longhistory import BLOCK, LongHistory, Unsynced, content

HISTORY = LongHistory(seconds=900, disk_bytes=16 << 20, extents=150, seed=3)
START_NS = 1_700_000_000 * 10**9
FIRST_BLOCK_S_MAX = 1.0


def check(store: Store, machine: uuid.UUID, seconds: set[int]) -> None:
    """The whole disk, and its extents, at each of the seconds."""
    for second, last in enumerate(HISTORY.last_writers()):
        if second not in seconds:
            continue
        at = store.position_at(machine, START_NS + second * 10**9)
        assert at.seq == second
        with ImageReader(store, machine, at) as image:
            assert image.read(0, 0, HISTORY.disk_bytes) == content(last, 0, HISTORY.disk_bytes), f"second {second}"
            data_bytes = sum(size for _, size in image.data_extents(0))
            assert data_bytes == int((last > 0).sum()) * BLOCK


def test_any_second_of_a_long_history(tmp_path: Path) -> None:
    chosen = set(random.Random(4).sample(range(1, HISTORY.seconds + 1), 12))
    with Store.open(tmp_path, fs=Unsynced(), file_bytes=64 << 20) as store:
        disk = DiskInfo(index=0, name="vda", size_bytes=HISTORY.disk_bytes)
        machine = store.create_machine("db1", [disk]).uuid
        position = store.live(machine)
        for raw in HISTORY.segments(machine, position, START_NS):
            position, _ = store.put_segment(machine, raw)
        check(store, machine, chosen)
    runs = sorted((tmp_path / "runs").rglob("*.run"))
    assert runs, "the index has been spilled"
    shutil.rmtree(tmp_path / "runs")
    with Store.open(tmp_path) as store:
        began_s = time.monotonic()
        with ImageReader(store, machine, position) as image:
            image.read(0, 0, BLOCK)
        assert time.monotonic() - began_s < 30 * FIRST_BLOCK_S_MAX, "it is built again at once"
        check(store, machine, chosen)


def test_points_come_by_the_page(tmp_path: Path) -> None:
    with Store.open(tmp_path, fs=Unsynced(), file_bytes=64 << 20) as store:
        disk = DiskInfo(index=0, name="vda", size_bytes=HISTORY.disk_bytes)
        machine = store.create_machine("db1", [disk]).uuid
        sizes = {}
        for raw in HISTORY.segments(machine, store.live(machine), START_NS):
            at, _ = store.put_segment(machine, raw)
            sizes[str(at)] = len(raw)
        listed: list[tuple[str, int]] = []
        end_ns = 2**63
        while True:
            page = store.points_page(machine, 0, end_ns, 200)
            assert len(page) <= 200
            assert not page.fuzzy
            listed[:0] = [(point.position, point.stored_bytes) for point in page]
            if not page.more:
                break
            end_ns = page[0].sealed_at_ns
        assert listed == list(sizes.items())
        assert [Position.parse(position).seq for position, _ in listed] == list(range(1, HISTORY.seconds + 1))
