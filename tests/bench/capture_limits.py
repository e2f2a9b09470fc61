"""How fast a disk may be written before capture loses an event: a burst of 10 s at growing rates.

Keys: ``max_mb_s_no_loss`` (sequential 1 MiB writes) and ``max_iops_no_loss`` (random 4 KiB writes): the highest rate
that was reached with no lost event and no fuzzy second. The last step is "as fast as it goes".
"""

from __future__ import annotations

from collections.abc import Sequence

from tests.bench.priority import only_when_idle
from tests.bench.writer import write
from tests.harness.plant import Plant

SECONDS = 10
DISK_BYTES = 1 << 30
SEQUENTIAL_MB_PER_S: Sequence[float | None] = (100, 200, 400, 700, 1000, None)
RANDOM_IOPS: Sequence[float | None] = (10_000, 25_000, 50_000, 100_000, None)


def measure() -> dict[str, float]:
    with Plant(sizes=(DISK_BYTES,), ring_bytes=64 << 20) as plant:
        plant.start_all()
        plant.wait_recovery_point(120)
        only_when_idle(plant.server.pid, plant.replay.pid)
        sequential = _climb(plant, "1m", "write", SEQUENTIAL_MB_PER_S)
        iops = _climb(plant, "4k", "randwrite", [rate and rate * 4096 / 1e6 for rate in RANDOM_IOPS])
    return {"max_mb_s_no_loss": round(sequential, 1), "max_iops_no_loss": round(iops * 1e6 / 4096)}


def _climb(plant: Plant, block: str, pattern: str, rates: Sequence[float | None]) -> float:
    """The highest rate reached without loss, MB/s."""
    best = 0.0
    for rate in rates:
        before = plant.agent_report()
        reached = write(plant.disks[0].device, seconds=SECONDS, block=block, pattern=pattern, mb_per_s=rate, depth=32)
        plant.settle(300)
        after = plant.agent_report()
        clean = (before.lost_events, before.resyncs) == (after.lost_events, after.resyncs)
        print(
            f"{block} {pattern}, asked {rate or 'all'}: reached {reached:.1f} MB/s, "
            f"lost {after.lost_events - before.lost_events}, resyncs {after.resyncs}",
            flush=True,
        )
        if not clean:
            break
        best = max(best, reached)
    return best
