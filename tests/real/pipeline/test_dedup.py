"""Machines that are copies of one that the server has: hardly anything is sent, and their images are right bit for bit,
whatever happens to the first machine and to the server meanwhile. Zeros are sent by nobody."""

from __future__ import annotations

import os

import pytest

from tests.harness import filesystem, images
from tests.harness.loop import drop_caches
from tests.harness.plant import Plant
from tests.harness.twin import Twin, sent_bytes, twin, wait_hints

pytestmark = [pytest.mark.real, pytest.mark.timeout(240)]

SIZES = (96 << 20, 8 << 20)
CONTENT_BYTES = 32 << 20
REWRITTEN_BYTES = 3 << 20
"""Of the first machine after its hints were made: stale ones."""
SLOW_MB_PER_S = 80
"""Reading of the second machine: slow enough to be interrupted."""
SPENT_MAX = 0.02


def test_copies_of_a_machine_are_seeded_from_what_is_there() -> None:
    with Plant(sizes=SIZES) as plant:
        _fill(plant)
        plant.start_server()
        plant.enrol()
        plant.start_agent()
        plant.protect()
        plant.wait_recovery_point()
        first = sent_bytes(plant)
        assert CONTENT_BYTES < first < CONTENT_BYTES * 1.1, f"{first} bytes: zeros were sent"
        wait_hints(plant)

        with twin(plant, "second", copy_mb_per_s=SLOW_MB_PER_S) as second:
            changed = _rewrite(plant)
            second.start()
            second.wait_prefill()
            plant.kill("server")
            _check(second)
            spent = sent_bytes(second)
            print(f"first {first}, second {spent} bytes, {changed} of them stale")
            # Random content does not shrink; what the first machine does not have any more has to travel.
            assert changed <= spent < changed + first * SPENT_MAX
            assert second.asked_bytes() < first * SPENT_MAX

        with twin(plant, "third", copy_mb_per_s=SLOW_MB_PER_S) as third:
            third.start()
            third.wait_prefill()
            plant.stop_agent()
            plant.client.ask("DELETE", "/v1/operator/machines/plant", query={"force": "1"})
            _check(third)


def _fill(plant: Plant) -> None:
    filesystem.make("ext4", plant.disks[0].device)
    mounted = plant.work_dir / "fill"
    plant.namespace.mount(plant.disks[0].device, mounted)
    for number in range(8):
        count = CONTENT_BYTES // 8 >> 20
        plant.namespace.run(["dd", "if=/dev/urandom", f"of={mounted}/{number}", "bs=1M", f"count={count}"])
    plant.namespace.unmount(mounted)
    drop_caches(plant.disks[0].device)


def _rewrite(plant: Plant) -> int:
    """In the middle of a file, past the file system: the copy was made before. Bytes that differ now."""
    copy = (plant.work_dir / "second" / "disk0.img").read_bytes()
    step = 64 << 10
    full = [any(copy[at : at + step]) for at in range(0, len(copy), step)]
    count = REWRITTEN_BYTES // step
    begin = next(first for first in range(len(full)) if all(full[first : first + count])) * step
    with plant.disks[0].device.open("r+b", buffering=0) as disk:
        disk.seek(begin)
        disk.write(os.urandom(REWRITTEN_BYTES))
        os.fsync(disk.fileno())
    plant.settle()
    return REWRITTEN_BYTES


def _check(copy: Twin) -> None:
    """Its newest recovery point is its disks, and they hold a sound file system."""
    copy.wait_recovery_point(90)
    at = copy.settle()
    for index, disk in enumerate(copy.disks):
        drop_caches(disk.device)
        recovered = copy.recover(at, index)
        images.assert_equal(disk.device, recovered, f"disk {index} of {copy.name} at {at.short}")
    filesystem.fsck("ext4", copy.disks[0].device)
