"""The second of two identical machines: how much of its first seed travels.

One disk with an ext4 that holds a part of this host's own programs and libraries. The second machine's disk is a copy
of it, started as machines are that were made from one image: with its own host name, keys and a little log. Keys:
``dedup_second_seed_ratio``: the bytes of all its segments and of asking, over those of the first;
``dedup_second_seed_s``: until its first recovery point.
"""

from __future__ import annotations

import time
from pathlib import Path

from tests.harness import filesystem, images
from tests.harness.loop import LoopDisk, drop_caches
from tests.harness.mounts import MountNamespace
from tests.harness.plant import Plant
from tests.harness.twin import sent_bytes, twin, wait_hints

DISK_BYTES = 1 << 30
CONTENT_BYTES = 384 << 20
LOG_BYTES = 1 << 20


def measure() -> dict[str, float]:
    with Plant(sizes=(DISK_BYTES,)) as plant:
        _fill(plant)
        plant.start_server()
        plant.enrol()
        plant.start_agent()
        began = time.monotonic()
        plant.protect()
        plant.wait_recovery_point(120)
        first_s, first = time.monotonic() - began, sent_bytes(plant)
        print(f"first machine: {first / 1e6:.1f} MB sent, recovery point after {first_s:.1f} s", flush=True)
        wait_hints(plant)
        with twin(plant, "second") as second:
            _personalise(plant.namespace, second.disks[0], second.work_dir / "own")
            began = time.monotonic()
            second.start()
            second.wait_recovery_point(120)
            second_s, sent = time.monotonic() - began, sent_bytes(second)
            asked = second.asked_bytes()
            print(
                f"second machine: {sent / 1e6:.2f} MB sent, up to {asked / 1e6:.2f} MB of asking, "
                f"recovery point after {second_s:.1f} s",
                flush=True,
            )
            at = second.settle()
            drop_caches(second.disks[0].device)
            images.assert_equal(second.disks[0].device, second.recover(at, 0), "the second machine")
        return {
            "dedup_second_seed_ratio": round((sent + asked) / first, 5),
            "dedup_second_seed_s": round(second_s, 1),
        }


def _fill(plant: Plant) -> None:
    filesystem.make("ext4", plant.disks[0].device)
    mounted = plant.work_dir / "fill"
    plant.namespace.mount(plant.disks[0].device, mounted)
    # Whole files until there is enough; tar ends when its reader does.
    copy = f"tar -C / -cf - usr/bin usr/lib 2>/dev/null | head -c {CONTENT_BYTES} | tar -C {mounted} -xf - 2>/dev/null"
    plant.namespace.run(["sh", "-c", f"{copy}; sync"], deadline_s=120)
    plant.namespace.unmount(mounted)
    drop_caches(plant.disks[0].device)


def _personalise(namespace: MountNamespace, disk: LoopDisk, mounted: Path) -> None:
    namespace.mount(disk.device, mounted)
    script = f"""
        mkdir -p {mounted}/etc/ssh {mounted}/var/log
        echo second > {mounted}/etc/hostname
        head -c 16 /dev/urandom | base64 > {mounted}/etc/machine-id
        head -c 4096 /dev/urandom > {mounted}/etc/ssh/key
        head -c {LOG_BYTES} /dev/urandom > {mounted}/var/log/boot
        sync
    """
    namespace.run(["sh", "-c", script])
    namespace.unmount(mounted)
    drop_caches(disk.device)
