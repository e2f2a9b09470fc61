"""What the agent costs at a given rate of change, and how far the standby lags behind.

Random 16 KiB direct writes at 1, 5, 20 and 100 MB/s, then as fast as they go. The agent is the supervisor, the pipeline
and the drainer together. Keys: ``agent_cpu_pct_at_N`` (median of the rounds, % of one core), ``agent_rss_mb_max`` (the
most in any round at any rate), ``lag_p50_s_at_20`` and ``lag_p99_s_at_20`` (sealed to applied and acknowledged).
"""

from __future__ import annotations

import statistics
import threading
import time

from journal.position import Position
from tests.bench.account import Meter
from tests.bench.priority import only_when_idle
from tests.bench.writer import write
from tests.harness.observed import CONSUMER
from tests.harness.plant import Plant

RATES_MB_PER_S = (1, 5, 20, 100)
LAG_RATE_MB_PER_S = 20
ROUNDS = 3
SECONDS = 10
DISK_BYTES = 1 << 30


def measure() -> dict[str, float]:
    figures: dict[str, float] = {}
    with Plant(sizes=(DISK_BYTES,)) as plant:
        plant.start_all()
        plant.wait_recovery_point(120)
        only_when_idle(plant.server.pid, plant.replay.pid)
        cpu: dict[float, list[float]] = {rate: [] for rate in RATES_MB_PER_S}
        rss: list[float] = []
        for turn in range(ROUNDS):
            for rate in RATES_MB_PER_S:
                cost, reached = _run(plant, rate)
                print(
                    f"round {turn} asked {rate} MB/s reached {reached:.1f}: "
                    f"{cost.cost.cpu_pct:.2f} % of a core, {cost.cost.rss_mb_max:.0f} MB",
                    flush=True,
                )
                cpu[rate].append(cost.cost.cpu_pct)
                rss.append(cost.cost.rss_mb_max)
        idle = _idle(plant)
        for rate in RATES_MB_PER_S:
            figures[f"agent_cpu_pct_at_{rate}"] = round(statistics.median(cpu[rate]), 2)
        figures["agent_cpu_pct_idle"] = round(idle, 2)
        lags = _lags(plant)
        print("lags sealed -> applied, s:", " ".join(f"{lag:.2f}" for lag in lags))
        figures["lag_p50_s_at_20"] = round(statistics.median(lags), 2)
        figures["lag_p99_s_at_20"] = round(lags[min(len(lags) - 1, int(len(lags) * 0.99))], 2)
        cost, reached = _run(plant, None)
        print(f"unlimited reached {reached:.1f} MB/s: {cost.cost.cpu_pct:.1f} %, {cost.cost.rss_mb_max:.0f} MB")
        figures["agent_rss_mb_max"] = round(max(*rss, cost.cost.rss_mb_max), 1)
    return figures


def _run(plant: Plant, rate: float | None) -> tuple[Meter, float]:
    with Meter(plant.agent.pid) as meter:
        reached = write(plant.disks[0].device, seconds=SECONDS, block="16k", pattern="randwrite", mb_per_s=rate)
    plant.settle(180)
    return meter, reached


def _idle(plant: Plant) -> float:
    with Meter(plant.agent.pid) as meter:
        time.sleep(SECONDS)
    return meter.cost.cpu_pct


def _lags(plant: Plant) -> list[float]:
    """Seconds from each segment's seal to the first look at which the standby had acknowledged it, sorted.

    The looks are some milliseconds apart, so a lag is at most that much too large, never too small.
    """
    looks: list[tuple[float, Position]] = []
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            at = plant.client.cursor(plant.machine, CONSUMER)
            if at is not None and (not looks or looks[-1][1] < at):
                looks.append((time.monotonic_ns() / 1e9, at))

    before = plant.settle(120)
    plant.wait_applied(before)
    watcher = threading.Thread(target=look)
    watcher.start()
    write(plant.disks[0].device, seconds=30, block="16k", pattern="randwrite", mb_per_s=LAG_RATE_MB_PER_S)
    last = plant.settle(60)
    plant.wait_applied(last)
    done.set()
    watcher.join()
    lags = []
    for header in plant.history():
        if before < header.position <= last and header.is_recovery_point:
            seen = next((moment for moment, at in looks if at >= header.position), None)
            if seen is not None:
                lags.append(seen - header.sealed_monotonic_ns / 1e9)
    return sorted(lags)
