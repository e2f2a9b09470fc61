"""pgbench on a protected against an unprotected disk, in turns: the median ratio of the rounds.

Two equal clusters as PostgreSQL configures them, one on a protected loop disk, one on a bare one; halfway both are made
anew, with their places changed. A round is A B B A, the next one B A A B, and its ratio that of the geometric means, so
that neither drift of the machine nor what the run before has left to be written favours one of them. pgbench vacuums
its small tables before each run, or how often each cluster happened to do so would decide which is the faster one. The
disks' files are written from end to end before, and bypass the page cache where their file system can do that, so that
their blocks are there as a disk's are. A virtual machine's processors and disk vary by a tenth from run to run: the
standard error is printed with the ratios.

Keys: ``tps_ratio`` with both on this host's disk, where a commit waits for it, as a database's does, and more clients
than processors, which keep those busy; ``tps_ratio_one_client`` the same with one, which leaves them time;
``tps_ratio_memory`` with both in memory, the worst case: nothing waits, and every cycle of the agent is taken from the
database. The agent works as always. In reality server and standby are other machines: the server lies in memory and
works only when the processors are idle; there is no standby, because the kernel writes its disks with the priority of
everything else (on two processors that alone took a tenth of the transactions), and nothing on the source depends on
it.
"""

from __future__ import annotations

import re
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench.priority import as_its_unit_says, only_when_idle
from tests.harness import filesystem
from tests.harness.loop import LoopDisk, scratch_dir
from tests.harness.plant import Plant
from tests.harness.postgres import AS_SHIPPED, PostgresInstance
from tests.harness.process import run


@dataclass(frozen=True, slots=True)
class Variant:
    rounds: int
    clients: int
    in_memory: bool = False


VARIANTS = {
    "tps_ratio": Variant(24, 4),
    "tps_ratio_one_client": Variant(8, 1),
    "tps_ratio_memory": Variant(8, 4, in_memory=True),
}
SECONDS = 3
"""Short, so that the runs of a round meet the same host: many short ones tell more than few long ones."""
WARM_UP_S = 5
SCALE = 10
DISK_BYTES = 2560 << 20
"""The cluster, and a log of 1 GB."""


def measure() -> dict[str, float]:
    figures: dict[str, float] = {}
    for key, variant in VARIANTS.items():
        if variant.in_memory:
            directory = scratch_dir("cdp-tps-")
        else:
            directory = Path(tempfile.mkdtemp(prefix="cdp-tps-", dir="/var/tmp"))
        print(f"-- {key}", flush=True)
        try:
            ratios, lost = [], 0
            for order in (("protected", "bare"), ("bare", "protected")):
                of_half, lost_in_half = _rounds(directory, variant, order)
                ratios += of_half
                lost += lost_in_half
        finally:
            shutil.rmtree(directory)
        error = statistics.stdev(ratios) / len(ratios) ** 0.5
        print(f"mean {statistics.geometric_mean(ratios):.3f}, standard error {error:.3f}; lost events {lost}")
        figures[key] = round(statistics.median(ratios), 3)
        figures[key.replace("ratio", "lost_events")] = lost
    return figures


def _rounds(directory: Path, variant: Variant, places: Sequence[str]) -> tuple[list[float], int]:
    """The ratios of half of the rounds, and how many events the capture lost. ``places``: whose is made first."""
    with Plant(sizes=(DISK_BYTES,), disk_dir=directory) as plant:
        bare = LoopDisk(directory / "bare.img", DISK_BYTES)
        disks = {"protected": plant.disks[0], "bare": bare}
        databases: dict[str, PostgresInstance] = {}
        try:
            for name in places:
                _allocate(disks[name])
                mount = plant.work_dir / "mnt" / name
                filesystem.make("ext4", disks[name].device)
                plant.namespace.mount(disks[name].device, mount)
                database = PostgresInstance(
                    name, plant.namespace, mount, mount, plant.work_dir, plant.log_dir, settings=AS_SHIPPED
                )
                database.initialise()
                database.start()
                databases[name] = database
                run([*database.client("pgbench"), "-i", "-q", "-s", str(SCALE)], deadline_s=300)
            plant.start_server()
            plant.enrol()
            plant.start_agent()
            plant.protect()
            plant.wait_recovery_point(180)
            as_its_unit_says(plant.agent.pid)
            only_when_idle(plant.server.pid)
            ratios = []
            for database in databases.values():
                # Checkpoints come as configured from here on. One before each run would make every run that of the
                # seconds after a checkpoint, in which PostgreSQL writes whole pages into its log.
                database.psql("CHECKPOINT")
                _pgbench(database, variant.clients, WARM_UP_S)
            for turn in range(variant.rounds // 2):
                order = ("bare", "protected") if turn % 2 else ("protected", "bare")
                runs = [
                    (name, _pgbench(databases[name], variant.clients, SECONDS)) for name in (*order, *reversed(order))
                ]
                tps = {name: [tps for of, tps in runs if of == name] for name in order}
                ratios.append(statistics.geometric_mean(tps["protected"]) / statistics.geometric_mean(tps["bare"]))
                print(
                    f"round {turn}: {', '.join(f'{name} {tps:.0f}' for name, tps in runs)} tps; {ratios[-1]:.3f}",
                    flush=True,
                )
            return ratios, plant.agent_report().lost_events
        finally:
            try:
                for database in databases.values():
                    database.close()
                for name in databases:
                    plant.namespace.unmount(plant.work_dir / "mnt" / name)
            finally:
                bare.close()
                bare.backing.unlink()
                plant.disks[0].backing.unlink()


def _allocate(disk: LoopDisk) -> None:
    """Give the disk all its blocks, and its own way to them."""
    run(
        ["dd", "if=/dev/zero", f"of={disk.backing}", "bs=4M", f"count={DISK_BYTES >> 22}", "conv=notrunc,fsync"],
        deadline_s=300,
    )
    run(["losetup", "--direct-io=on", str(disk.device)], codes=(0, 1))


def _pgbench(database: PostgresInstance, clients: int, seconds: int) -> float:
    argv = [*database.client("pgbench"), "-c", str(clients), "-j", str(min(clients, 2)), "-T", str(seconds)]
    found = re.search(r"tps = ([0-9.]+)", run(argv, deadline_s=seconds + 60))
    assert found is not None
    return float(found[1])
