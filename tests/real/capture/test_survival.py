"""Drainer, session and reader die and come back; the capture goes on and nothing is lost or told twice."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from cdp.agent.capture import layout, pins
from cdp.agent.capture.errors import CaptureMismatch, CaptureMissing, SpoolMissing, SpoolRangeGone
from cdp.agent.capture.session import CaptureSession
from cdp.agent.capture.settle import wait_settled
from cdp.agent.capture.spool import RawSpool
from tests.harness.mounts import MountNamespace
from tests.harness.process import run
from tests.harness.wait import wait_until
from tests.real.capture.rig import MIB, Model, Rig, fio, write_direct

pytestmark = pytest.mark.real

KILLS = 50


def passed(moment_s: float) -> None:
    wait_until(lambda: time.monotonic() >= moment_s, 1, "the moment", 0.001)


def wait_for_pass(rig: Rig, since_ns: int) -> None:
    wait_until(lambda: rig.spool.drainer_pass_ns > since_ns, 20, "a pass of the drainer", 0.002)


def test_drainer_killed_at_random_moments(rig: Rig) -> None:
    seed = int(os.environ.get("CDP_TEST_SEED", time.time_ns() % 1_000_000))
    print(f"CDP_TEST_SEED={seed}")
    source = random.Random(seed)
    device = rig.add_disk()
    # Large enough for the times without a drainer, however long a busy machine takes to start one.
    session = rig.attach(ring_bytes=64 * MIB)
    rig.start_drainer()
    rig.cut()
    sizes = ["--bsrange=4k-64k", "--iodepth=4", "--size=64m", "--time_based", "--runtime=600", "--rate=15m"]
    load = subprocess.Popen(fio("--name=x", f"--filename={device}", *sizes, "--output=/dev/null"))
    model = Model([64 * MIB])
    serials: list[np.ndarray[tuple[int, ...], np.dtype[np.uint64]]] = []
    start = 0
    try:
        for _ in range(KILLS):
            if source.random() < 0.8:  # else it is killed while it starts
                since = time.monotonic_ns()
                wait_for_pass(rig, since)
            passed(time.monotonic() + source.uniform(0.0, 0.08))
            rig.kill_drainer()
            # Alternately read while nobody drains, and while the successor rewrites what the killed one had begun.
            if source.random() < 0.5:
                rig.start_drainer()
            end = rig.spool.drained
            serials += [
                records["bio"][(records["flags"] & layout.LAST) != 0].copy() for records in rig.spool.read(start, end)
            ]
            if rig.drainer is not None and rig.drainer.poll() is not None:
                rig.start_drainer()
            start = end
    finally:
        load.send_signal(signal.SIGINT)
        load.wait()
    records = rig.records()
    assert session.lost.total == 0
    last = records["bio"][(records["flags"] & layout.LAST) != 0]
    assert len(np.unique(last)) == len(last), "a bio was told twice"
    by_cpu = np.sort(last)
    for cpu in np.unique(by_cpu & np.uint64(0xFFFF)):
        serial = by_cpu[(by_cpu & np.uint64(0xFFFF)) == cpu] >> np.uint64(16)
        assert (np.diff(serial) == 1).all(), "a bio is missing"
    read_live = np.concatenate(serials)
    assert (last[: len(read_live)] == read_live).all(), "what was read between the kills changed afterwards"
    model.apply(records)
    assert rig.content() == model.images[0].tobytes()


def test_the_drainer_continues_after_its_reader_and_itself_were_gone(rig: Rig) -> None:
    device = rig.add_disk()
    session = rig.attach()
    write_direct(device, 0, b"1" * 4096)
    rig.start_drainer()
    rig.cut()
    capture = session.capture_id
    rig.kill_drainer()
    session.close()
    write_direct(device, 4096, b"2" * 4096)  # nobody is there

    again = rig.attach()
    assert again.reopened and again.capture_id == capture
    rig.start_drainer()
    records = rig.records()
    assert [bytes(payload[:1]) for payload in records["payload"]] == [b"1", b"2"]
    assert again.lost.total == 0


def test_the_agent_is_killed_with_the_capture_open(rig: Rig, tmp_path: Path) -> None:
    device = rig.add_disk()
    agent = subprocess.Popen(
        [sys.executable, "-c", _AGENT, str(device), str(rig.pin_dir)], stdout=subprocess.PIPE, text=True
    )
    assert agent.stdout is not None
    with agent.stdout:
        capture = int(agent.stdout.readline())
        agent.kill()
        agent.wait()
    write_direct(device, 0, b"3" * 4096)
    assert rig.attach().capture_id == capture
    rig.start_drainer()
    assert rig.records()["payload"][0].tobytes() == b"3" * 4096


_AGENT = """
import sys, signal
from pathlib import Path
from cdp.agent.capture import devices
from cdp.agent.capture.session import CaptureSession
print(CaptureSession.attach([devices.inspect(sys.argv[1])], Path(sys.argv[2])).capture_id, flush=True)
signal.pause()
"""


def test_an_attach_that_was_killed_half_way_is_cleaned_up(rig: Rig) -> None:
    rig.add_disk()
    rig.attach().close()
    partial = rig.pin_dir.with_name(rig.pin_dir.name + "-partial")
    rig.pin_dir.rename(partial)  # as if killed just before the rename
    assert not rig.attach().reopened
    assert not partial.exists()


def test_detach_leaves_nothing(rig: Rig) -> None:
    device = rig.add_disk()
    session = rig.attach()
    session.detach()
    rig.session = None
    assert not rig.pin_dir.exists()
    with pytest.raises(CaptureMissing):
        pins.open_maps(rig.pin_dir, ["ring"])
    write_direct(device, 0, b"x" * 512)
    pins.remove(rig.pin_dir)


def test_a_disk_is_added_to_a_running_capture(rig: Rig) -> None:
    first = rig.add_disk()
    rig.attach().close()
    second = rig.add_disk(32 * MIB)
    session = rig.attach()
    assert session.reopened and len(session.stamps(1)) == 32 * MIB // session.granule_bytes(1)
    rig.start_drainer()
    write_direct(second, 0, b"2" * 4096)
    write_direct(first, 0, b"1" * 4096)
    assert rig.records()["disk"].tolist() == [1, 0]


def test_other_disks_are_refused(rig: Rig) -> None:
    rig.add_disk()
    rig.add_disk()
    rig.attach().close()
    with pytest.raises(CaptureMismatch):
        CaptureSession.attach(rig.devices[:1], rig.pin_dir)
    with pytest.raises(CaptureMismatch):
        CaptureSession.attach(rig.devices[::-1], rig.pin_dir)


def test_a_new_capture_starts_a_new_spool(rig: Rig) -> None:
    device = rig.add_disk()
    old = rig.attach()
    rig.start_drainer()
    write_direct(device, 0, b"o" * MIB)
    rig.cut()
    old_id = old.capture_id
    rig.kill_drainer()
    old.detach()
    new = rig.attach()
    assert not new.reopened and new.capture_id != old_id
    rig._spool = None
    with pytest.raises(SpoolMissing):
        RawSpool.open(rig.spool_dir, new.capture_id)
    write_direct(device, 0, b"n" * 4096)
    rig.start_drainer()
    assert rig.records()["payload"][0].tobytes() == b"n" * 4096


def test_a_lost_spool_directory_is_told(rig: Rig) -> None:
    device = rig.add_disk()
    rig.attach()
    rig.start_drainer()
    write_direct(device, 0, b"o" * MIB)
    position = rig.cut().position
    rig.kill_drainer()
    rig._spool = None
    run(["rm", "-r", str(rig.spool_dir)])
    rig.start_drainer()
    assert rig.cut().position == position
    with pytest.raises(SpoolRangeGone):
        list(rig.spool.read(0, position))


def test_memory_idle_and_start(rig: Rig) -> None:
    rig.add_disk()
    rig.attach()
    started = time.monotonic()
    rig.start_drainer()
    rig.cut()
    took = time.monotonic() - started
    assert rig.drainer is not None
    status = Path(f"/proc/{rig.drainer.pid}/status").read_text()
    resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
    print(f"ready after {took:.3f} s, resident {resident} KiB, realtime {rig.spool.realtime}")
    assert took < 2
    assert resident << 10 < layout.RING_BYTES + (32 << 20)


def test_release_bounds_the_spool(rig: Rig) -> None:
    device = rig.add_disk()
    rig.attach()
    rig.start_drainer()
    for _ in range(6):
        write_direct(device, 0, os.urandom(32 * MIB))
        rig.spool.release(rig.cut().position)
    rig.cut()
    chunks = [path for path in rig.spool_dir.iterdir() if path.name.startswith("raw-")]
    assert len(chunks) <= 3
    with pytest.raises(SpoolRangeGone):
        rig.spool.release(0)


def test_the_spool_must_not_lie_on_a_protected_disk(rig: Rig) -> None:
    device = rig.add_disk()
    run(["mkfs.ext4", "-q", str(device)])
    rig.attach()
    with MountNamespace(rig.directory) as namespace:
        point = rig.directory / "mnt"
        namespace.mount(device, point)
        drain = [sys.executable, "-m", "cdp.agent.capture.drain", "--pin-dir", str(rig.pin_dir)]
        refused = subprocess.run(
            [*namespace.prefix, *drain, "--spool-dir", str(point / "raw"), "--spool-bytes", "0"],
            stderr=subprocess.PIPE,
            check=False,
        )
        namespace.unmount(point)
    assert refused.returncode == 78
    assert json.loads(refused.stderr)["code"] == "raw-spool-on-protected-disk"


def test_two_drainers_do_not_share_a_ring(rig: Rig) -> None:
    rig.add_disk()
    rig.attach()
    rig.start_drainer()
    rig.cut()
    first = rig.drainer
    rig.start_drainer()
    assert rig.drainer is not None
    code = rig.drainer.wait(20)
    rig.drainer = first
    assert code == 75


def test_sigterm_drains_first(rig: Rig) -> None:
    device = rig.add_disk()
    session = rig.attach()
    rig.start_drainer()
    rig.cut()
    write_direct(device, 0, os.urandom(2 * MIB))
    assert rig.drainer is not None
    rig.drainer.terminate()
    assert rig.drainer.wait(10) == 0
    assert rig.spool.drained == session.produced == session.consumed


async def test_settled_means_completed(rig: Rig) -> None:
    device = rig.add_disk()
    done = threading.Event()

    def load() -> None:
        while not done.is_set():
            write_direct(device, 0, bytes(65536))

    thread = threading.Thread(target=load)
    thread.start()
    try:
        since = time.monotonic_ns()
        await wait_settled(rig.devices, since)
        assert time.monotonic_ns() - since >= 1_000_000_000
    finally:
        done.set()
        thread.join()
