"""A writer that is killed, and a disk that is really full."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cdp.store import ImageReader, Store, verify
from cdp.store.errors import StoreFull
from journal.extent import SECTOR_BYTES
from journal.position import Position
from tests.store.source import disk_infos, make

WRITER = """
import sys
from pathlib import Path
from cdp.store import Store
from tests.store.source import SECOND_NS, Source

store = Store.open(sys.argv[1], file_bytes=256 << 10, flush_interval_s=0.01)
machine = store.machine("db1").uuid
source = Source(machine, [64 << 10], store.live(machine))
while True:
    number = source.position.seq + 1
    # The content tells the number, so that the image at any position is known without the writer.
    sector = number % 128
    raw = source.encode([(0, sector * 512, 512, 1)])
    position, _ = store.put_segment(machine, raw)
    source.accept(position)
    source.images = {position: source.images[position]}
    source.sealed.clear()
    print(position, flush=True)
    if number % 50 == 0:
        store.retain(machine, keep_bytes=512 << 10)
"""


def test_a_killed_writer_loses_nothing_it_acknowledged(tmp_path: Path) -> None:
    """On the real disk: tmp_path may be memory, which a kill cannot tell from one."""
    directory = Path(tempfile.mkdtemp(prefix="cdp-store-kill-"))
    seed = random.randrange(2**32)
    print("seed", seed)
    choose = random.Random(seed)
    try:
        with Store.open(directory) as store:
            machine = store.create_machine("db1", disk_infos(64 << 10)).uuid
        acknowledged: Position | None = None
        for _ in range(8):
            command = [sys.executable, "-c", WRITER, str(directory)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                assert process.stdout is not None
                for _ in range(choose.randrange(5, 90)):
                    acknowledged = Position.parse(process.stdout.readline().strip())
                process.send_signal(signal.SIGKILL)
                # What it had acknowledged before it died may still be in the pipe.
                for line in process.stdout:
                    if line.endswith("\n"):
                        acknowledged = Position.parse(line.strip())
            assert acknowledged is not None
            with Store.open(directory) as store:
                tip = store.live(machine)
                assert tip == acknowledged or tip.seq == acknowledged.seq + 1
                assert store.contains(machine, acknowledged)
                assert verify(store, machine).clean
                with ImageReader(store, machine, tip) as image:
                    assert len(image.read(0, 0, 64 << 10)) == 128 * SECTOR_BYTES
    finally:
        shutil.rmtree(directory)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "tiny"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(mount)], check=True)
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True)


@pytest.mark.real
def test_a_full_disk_refuses_keeps_what_it_has_and_recovers_by_retention(tiny_disk: Path) -> None:
    directory = tiny_disk / "store"
    stored: list[Position] = []
    with Store.open(directory, file_bytes=1 << 20, map_bytes=64 << 20) as store:
        source = make(store, 1 << 20)
        raw = b""
        with pytest.raises(StoreFull) as full:
            while True:
                raw = source.encode([(0, 0, 200 << 10, 1)], compressible=False)
                position, _ = store.put_segment(source.machine, raw)
                source.accept(position)
                stored.append(position)
        assert full.value.remedy and full.value.http_status == 507
        assert len(stored) > 5
        assert store.live(source.machine) == stored[-1]
        source.check(store, stored[-1])
    with Store.open(directory, file_bytes=1 << 20, map_bytes=64 << 20) as store:
        for position in stored:
            assert store.read_segment(source.machine, position) == source.sealed[position][1]
        assert store.retain(source.machine, keep_bytes=4 << 20).freed_bytes > 0
        position, _ = store.put_segment(source.machine, raw)
        source.check(store, position)
        assert verify(store, source.machine).clean
