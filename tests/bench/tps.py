"""pgbench on a protected against an unprotected disk, in turns. Key: ``tps_ratio``, the median ratio of the pairs.

Two equal clusters, one on a protected loop disk, one on a bare one; the order within a pair alternates, so that drift
of the machine hits both alike. The agent works as always; the server and the standby only when the processors are idle,
because in reality they are other machines.
"""

from __future__ import annotations

import re
import statistics

from tests.bench.idle import only_when_idle
from tests.harness import filesystem
from tests.harness.loop import LoopDisk
from tests.harness.plant import Plant
from tests.harness.postgres import PostgresInstance
from tests.harness.process import run

PAIRS = 10
SECONDS = 10
SCALE = 10
CLIENTS = 4
DISK_BYTES = 1 << 30


def measure() -> dict[str, float]:
    with Plant(sizes=(DISK_BYTES,)) as plant:
        bare = LoopDisk(plant.work_dir / "bare.img", DISK_BYTES)
        databases = {}
        try:
            for name, disk in (("protected", plant.disks[0]), ("bare", bare)):
                mount = plant.work_dir / "mnt" / name
                filesystem.make("ext4", disk.device)
                plant.namespace.mount(disk.device, mount)
                database = PostgresInstance(name, plant.namespace, mount, mount, plant.work_dir, plant.log_dir)
                database.initialise()
                database.start()
                databases[name] = database
                run([*database.client("pgbench"), "-i", "-q", "-s", str(SCALE)], deadline_s=300)
            plant.start_all()
            plant.wait_recovery_point(180)
            only_when_idle(plant.server.pid, plant.replay.pid)
            ratios = []
            for turn in range(PAIRS):
                order = ("protected", "bare") if turn % 2 else ("bare", "protected")
                tps = {name: _pgbench(databases[name]) for name in order}
                ratios.append(tps["protected"] / tps["bare"])
                print(
                    f"pair {turn}: protected {tps['protected']:.0f} tps, bare {tps['bare']:.0f} tps, "
                    f"ratio {ratios[-1]:.3f}",
                    flush=True,
                )
            lost = plant.agent_report().lost_events
            print(f"lost events {lost}")
        finally:
            for database in databases.values():
                database.close()
            for name in databases:
                plant.namespace.unmount(plant.work_dir / "mnt" / name)
            bare.close()
    return {"tps_ratio": round(statistics.median(ratios), 3), "tps_lost_events": lost}


def _pgbench(database: PostgresInstance) -> float:
    database.psql("CHECKPOINT")
    argv = [*database.client("pgbench"), "-n", "-c", str(CLIENTS), "-j", "2", "-T", str(SECONDS)]
    found = re.search(r"tps = ([0-9.]+)", run(argv, deadline_s=SECONDS + 60))
    assert found is not None
    return float(found[1])
