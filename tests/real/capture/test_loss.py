"""What cannot be recorded is stamped and counted: full ring, failed writes, whole disks, requests; never silence."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cdp.agent.capture import devices, layout
from cdp.agent.capture.control import Cause
from cdp.agent.capture.session import CaptureSession
from tests.harness.loop import LoopDisk
from tests.harness.process import run
from tests.harness.wait import wait_until
from tests.real.capture.rig import MIB, Model, Rig, fio, write_direct

pytestmark = pytest.mark.real


def settled_stamps(session: CaptureSession, disk: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint64]]:
    wait_until(lambda: session.losses().complete, 5, "complete stamps", 0.001)
    return session.stamps(disk).copy()


@pytest.mark.parametrize("drained", [False, True])
def test_full_ring_stamps_every_granule_that_differs(rig: Rig, drained: bool) -> None:
    device = rig.add_disk()
    session = rig.attach(ring_bytes=MIB)
    if drained:
        rig.start_drainer()
    sizes = ["--bsrange=4k-1m", "--iodepth=16", "--size=64m", "--io_size=512m"]
    run(fio("--name=x", f"--filename={device}", *sizes))
    if not drained:
        rig.start_drainer()
    records = rig.records()
    assert session.lost.events["ring-full"] > 0
    assert set(session.lost.events) == {"ring-full"}
    losses = session.losses()
    assert losses.complete and losses.generation == session.lost.total
    model = Model([64 * MIB])
    model.apply(records)
    stamps = settled_stamps(session, 0)
    different = model.differing_granules(0, rig.content(), session.granule_bytes(0))
    assert different, "the load was too weak to overflow the ring"
    assert different <= set(np.flatnonzero(stamps).tolist())
    # What was submitted after the last loss of its granule wins over a re-read: with the losers re-read, all is equal.
    granule = records["offset"] // np.uint64(session.granule_bytes(0))
    winners = records["drop_generation"] >= stamps[granule.astype(np.intp)]
    image = np.frombuffer(rig.content(), np.uint8).copy()
    repaired = Model([64 * MIB])
    repaired.images[0][:] = image
    repaired.apply(records, winners)
    assert (repaired.images[0] == image).all()


def test_capture_goes_on_after_an_overflow(rig: Rig) -> None:
    device = rig.add_disk()
    session = rig.attach(ring_bytes=MIB)
    write_direct(device, 0, os.urandom(4 * MIB))
    generation = session.drop_generation()
    assert generation > 0
    rig.start_drainer()
    position = rig.cut().position
    write_direct(device, 0, bytes(range(256)) * 16)
    records = rig.records(position)
    assert len(records) == 1 and int(records["drop_generation"][0]) == generation
    assert session.drop_generation() == generation


def test_full_spool_becomes_a_loss_not_a_gap(rig: Rig) -> None:
    device = rig.add_disk()
    session = rig.attach(ring_bytes=MIB)
    rig.start_drainer(spool_bytes=0)  # the least possible: two chunks
    spool = rig.spool
    while not spool.stalled_passes:
        write_direct(device, 0, os.urandom(MIB // 2))
        wait_until(lambda: spool.drained == session.produced or spool.stalled_passes, 5, "a pass of the drainer", 0.001)
    assert spool.drained >= layout.CHUNK_BYTES
    write_direct(device, 0, os.urandom(4 * MIB))
    assert session.lost.events["ring-full"] > 0
    rig.spool.release(rig.spool.drained)
    position = rig.cut().position
    rig.spool.release(position)
    write_direct(device, MIB, b"x" * 4096)
    assert rig.records(position)["payload"][0].tobytes() == b"x" * 4096


def test_requested_losses(rig: Rig) -> None:
    rig.add_disk()
    session = rig.attach()
    granule = session.granule_bytes(0)
    session.mark_lost(0, 3 * granule - 1, 2)
    assert np.flatnonzero(settled_stamps(session, 0)).tolist() == [2, 3]
    session.mark_lost(0)
    assert (settled_stamps(session, 0) == 2).all()
    session.mark_lost(0, 0, granule, Cause.REQUESTED)
    assert settled_stamps(session, 0)[:2].tolist() == [3, 2]
    assert session.lost.events == {"requested": 3}


def test_wide_losses_of_a_large_disk(rig: Rig) -> None:
    device = rig.add_disk(8 << 40)
    session = rig.attach()
    assert session.granule_bytes(0) == 8 * MIB and len(session.stamps(0)) == 1 << 20
    write_direct(device, (8 << 40) - 4096, b"e" * 4096)
    session.mark_lost(0, 0, 5 << 40)
    assert not np.flatnonzero(session.stamps(0)).any(), "an interrupt must not stamp that much"
    started = time.monotonic()
    stamps = settled_stamps(session, 0)
    assert (stamps == 1).all(), "spread over the whole disk"
    assert time.monotonic() - started < 5
    assert session.losses().generation == 1


@contextlib.contextmanager
def tiny_tmpfs(rig: Rig, size: str) -> Iterator[Path]:
    """A file system too small for the sparse disk on it; in this process's own view of mounts, as losetup needs it."""
    point = rig.directory / "tiny"
    point.mkdir()
    run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(point)])
    try:
        yield point
    finally:
        run(["umount", str(point)])


def test_failed_write_marks_its_range(rig: Rig) -> None:
    with tiny_tmpfs(rig, "1m") as point:
        disk = LoopDisk(point / "disk", 16 * MIB)
        try:
            session = rig.attach(only=[devices.inspect(disk.device)])
            failed = set()
            # Page by page: the loop driver calls a write that its file system cut short a success.
            for offset in range(0, 2 * MIB, 4096):
                try:
                    write_direct(disk.device, offset, b"b" * 4096)
                except OSError as error:
                    assert error.errno in (errno.EIO, errno.ENOSPC)
                    failed.add(offset // session.granule_bytes(0))
            assert 0 not in failed and len(failed) > 10
            assert set(np.flatnonzero(settled_stamps(session, 0)).tolist()) == failed
            assert set(session.lost.events) == {"failed-write"}
        finally:
            session.detach()
            rig.session = None
            disk.close()


def test_failed_write_of_a_bio_based_device_dirties_the_disk(rig: Rig) -> None:
    control = Path("/sys/class/zram-control")
    if not control.exists():
        run(["modprobe", "zram"])  # Debian has it as a module
    number = (control / "hot_add").read_text().strip()
    queue = Path(f"/sys/block/zram{number}")
    device = Path(f"/dev/zram{number}")
    try:
        (queue / "disksize").write_text("64M")
        (queue / "mem_limit").write_text("1M")
        session = rig.attach(only=[devices.inspect(device)])
        rig.start_drainer()
        write_direct(device, 0, b"\1" * 4096)
        assert rig.records()["payload"][0].tobytes() == b"\1" * 4096
        with pytest.raises(OSError):
            write_direct(device, 0, os.urandom(8 * MIB))
        wait_until(lambda: "failed-write" in session.lost.events, 5, "the failed write")
        assert settled_stamps(session, 0).all()
    finally:
        if rig.session is not None:
            rig.session.detach()
            rig.session = None
        (control / "hot_remove").write_text(number)


def test_a_resized_disk_is_noticed(rig: Rig) -> None:
    rig.add_disk()
    session = rig.attach()
    assert session.disk_changed() == {}
    os.truncate(rig.disks[0].backing, 80 * MIB)
    run(["losetup", "--set-capacity", str(rig.disks[0].device)])
    assert "resized" in session.disk_changed()[0]
