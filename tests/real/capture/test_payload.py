"""What is written is what is captured: every size and alignment, every way to write, discards and zeroes, two disks."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest

from cdp.agent.capture.record import is_last
from journal.extent import Kind
from tests.harness.mounts import MountNamespace
from tests.harness.process import run
from tests.harness.wait import wait_until
from tests.real.capture.rig import MIB, Model, Rig, fio, write_direct

pytestmark = pytest.mark.real

SIZES = [512, 1024, 1536, 3584, 4096, 4608, 7680, 8192, 12800, 65536, 66048, 131072, 524288, MIB, 1536512, 4 * MIB]


@pytest.mark.parametrize("memory_shift", [0, 512, 1536])
def test_direct_writes_of_every_size(rig: Rig, memory_shift: int) -> None:
    device = rig.add_disk()
    rig.attach()
    rig.start_drainer()
    model = Model([64 * MIB])
    source = random.Random(7)
    start = 0
    for size in SIZES:
        data = source.randbytes(size)
        offset = source.randrange((64 * MIB - size) // 512) * 512
        write_direct(device, offset, data, memory_shift)
        records = rig.records(start)
        start = rig.spool.drained
        assert int(records["length"].sum()) == size
        assert int(records["offset"].min()) == offset
        assert is_last(records).sum() == len(np.unique(records["bio"]))
        assert (np.diff(records["submitted_ns"].astype(np.int64)) >= 0).all()
        model.apply(records)
    assert rig.session is not None and rig.session.lost.events == {}
    assert rig.content() == model.images[0].tobytes()


def test_sectors_of_4096_bytes(rig: Rig) -> None:
    device = rig.add_disk(sector_bytes=4096)
    rig.attach()
    rig.start_drainer()
    data = os.urandom(3 * 4096)
    write_direct(device, 5 * 4096, data)
    model = Model([64 * MIB])
    model.apply(rig.records())
    assert rig.content() == model.images[0].tobytes()
    assert rig.devices[0].sector_bytes == 4096


def test_buffered_writes(rig: Rig) -> None:
    device = rig.add_disk()
    rig.attach()
    rig.start_drainer()
    source = random.Random(8)
    with device.open("r+b") as file:
        for _ in range(300):
            size = source.randrange(1, 100_000)
            file.seek(source.randrange(64 * MIB - size))
            file.write(source.randbytes(size))
        file.flush()
        os.fsync(file.fileno())
    model = Model([64 * MIB])
    model.apply(rig.records())
    assert rig.content() == model.images[0].tobytes()


def test_a_write_to_a_partition_lands_at_its_place_on_the_disk(rig: Rig) -> None:
    device = rig.add_disk()
    table = rig.directory / "table"
    table.write_text("label: gpt\nstart=4096,size=40960\n")
    run(["sh", "-c", f"sfdisk --quiet {device} < {table}"])
    run(["partx", "--update", str(device)])
    partition = Path(f"{device}p1")
    wait_until(partition.exists, 10, "the partition")
    before = rig.content()
    rig.attach()
    rig.start_drainer()
    data = os.urandom(20_480)
    write_direct(partition, 8192, data)
    records = rig.records()
    assert int(records["offset"].min()) == 4096 * 512 + 8192
    model = Model([64 * MIB])
    model.images[0][:] = np.frombuffer(before, np.uint8)
    model.apply(records)
    assert rig.content() == model.images[0].tobytes()
    run(["partx", "--delete", str(device)])


@pytest.mark.parametrize(("options", "kind"), [([], Kind.DISCARD), (["--zeroout"], Kind.ZERO)])
def test_discard_and_write_zeroes(rig: Rig, options: list[str], kind: Kind) -> None:
    device = rig.add_disk()
    rig.attach()
    rig.start_drainer()
    write_direct(device, 0, os.urandom(8 * MIB))
    written = rig.cut().position
    run(["blkdiscard", *options, "--offset", str(MIB), "--length", str(5 * MIB), str(device)])
    records = rig.records(written)
    asked = records[records["op"] == kind]
    assert int(asked["length"].sum()) == 5 * MIB
    assert is_last(asked).all()
    if len(asked) < len(records):
        # The backing file system cannot zero ranges: the command failed, and the kernel wrote zeros instead.
        assert kind == Kind.ZERO and rig.session is not None and rig.session.lost.events["failed-write"] > 0
    model = Model([64 * MIB])
    model.apply(rig.records())
    assert rig.content() == model.images[0].tobytes()


def test_two_disks_come_in_submission_order(rig: Rig) -> None:
    first, second = rig.add_disk(), rig.add_disk()
    rig.attach()
    rig.start_drainer()
    for number in range(200):
        write_direct((first, second)[number % 2], number * 4096, number.to_bytes(4, "little") * 1024)
    records = rig.records()
    assert records["disk"].tolist() == [0, 1] * 100
    assert records["payload"][:, 0].tolist() == [number & 0xFF for number in range(200)]


def test_only_the_protected_disk_is_captured(rig: Rig) -> None:
    protected, other = rig.add_disk(), rig.add_disk()
    rig.attach(only=rig.devices[:1])
    rig.start_drainer()
    write_direct(other, 0, os.urandom(MIB))
    write_direct(protected, 0, os.urandom(4096))
    assert len(rig.records()) == 1


def test_random_load_on_two_disks(rig: Rig) -> None:
    devices = [rig.add_disk(), rig.add_disk()]
    rig.attach()
    rig.start_drainer()
    jobs = [f"--{word}" for n, device in enumerate(devices) for word in (f"name=d{n}", f"filename={device}")]
    sizes = ["--bsrange=512-256k", "--blockalign=512", "--iodepth=8", "--size=64m", "--io_size=96m", "--randseed=5"]
    run(fio(*sizes, *jobs))
    model = Model([64 * MIB] * 2)
    model.apply(rig.records())
    for number in range(2):
        assert rig.content(number) == model.images[number].tobytes()


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_file_system_under_fsync_load(rig: Rig, kind: str) -> None:
    device = rig.add_disk(512 * MIB)
    point = rig.directory / "mnt"
    point.mkdir()
    run([f"mkfs.{kind}", "-q", str(device)])
    model = Model([512 * MIB])
    model.images[0][:] = np.frombuffer(rig.content(), np.uint8)
    rig.attach(ring_bytes=64 * MIB)
    rig.start_drainer()
    with MountNamespace(rig.directory) as namespace:
        namespace.mount(device, point)
        load = ["fio", "--name=fs", f"--directory={point}", "--rw=randwrite", "--bsrange=1k-64k", "--size=16m"]
        namespace.run([*load, "--fsync=4", "--numjobs=2", "--nrfiles=8", "--io_size=24m", "--randseed=6"])
        namespace.run(["rm", f"{point}/fs.0.0"])
        namespace.unmount(point)
    model.apply(rig.records())
    assert rig.session is not None and rig.session.lost.events == {}
    assert rig.content() == model.images[0].tobytes()
