"""A seed under a bandwidth limit, while the source writes: the limit is kept, the line is used, the journal goes first.
Then a journal that is above the limit by itself: it lags, borrows before writes are lost, and says so."""

from __future__ import annotations

import os
import time

import pytest

from cdp.server import limit_messages as limits
from tests.harness import images
from tests.harness.loop import drop_caches
from tests.harness.plant import Plant, new_seed
from tests.harness.twin import sent_bytes
from tests.harness.wait import wait_until

pytestmark = [pytest.mark.real, pytest.mark.timeout(180)]

SIZE = 48 << 20
CONTENT_BYTES = 20 << 20
LIMIT = 4_000_000
JOURNAL_OPS_PER_S = 4
"""Of 256 KiB: a quarter of the limit."""
FLOOD_OPS_PER_S = 40
SPOOL_BYTES = 64 << 20


def test_a_limit_is_kept_by_the_seed_and_lent_to_the_journal() -> None:
    with Plant(sizes=(SIZE,), spool_bytes=SPOOL_BYTES) as plant:
        with plant.disks[0].device.open("r+b", buffering=0) as disk:
            disk.write(os.urandom(CONTENT_BYTES))
        plant.start_server()
        plant.enrol()
        _limit(plant, LIMIT)
        plant.start_agent()
        plant.protect()
        churn = plant.churn("journal", new_seed(), JOURNAL_OPS_PER_S, "sweep")
        wait_until(lambda: not plant.tip().is_genesis, 30, "the beginning of the seed")
        churn.start()
        began, before = time.monotonic(), sent_bytes(plant)
        lags: list[float] = []

        def seeded() -> bool:
            lags.append(next(stage.lag_s or 0.0 for stage in plant.status().stages if stage.stage == "stored"))
            return plant.state().recovery_point is not None

        wait_until(seeded, 90, "the end of the seed", poll_s=0.1)
        took, sent = time.monotonic() - began, sent_bytes(plant) - before
        churn.stop()
        lags.sort()
        print(
            f"{sent / 1e6:.1f} MB in {took:.1f} s, {sent / took / 1e6:.2f} MB/s; lag stored: "
            f"p50 {lags[len(lags) // 2]:.1f} s, most {lags[-1]:.1f} s"
        )
        assert 0.5 * LIMIT < sent / took < 1.15 * LIMIT
        assert lags[len(lags) // 2] < 4, "the journal waits for the seed"

        _limit(plant, 1_000_000)
        flood = plant.churn("flood", new_seed(), FLOOD_OPS_PER_S, "sweep")
        flood.start()
        wait_until(lambda: _shown(plant).borrowed_bytes > 0, 60, "bytes above the limit")
        wait_until(lambda: any("does not fit" in problem for problem in plant.status().problems), 30, "the problem")
        flood.stop()
        _limit(plant, None)
        at = plant.settle(60)
        assert plant.agent_report().resyncs == {"seed": 1}, "writes were dropped"
        drop_caches(plant.disks[0].device)
        images.assert_equal(plant.disks[0].device, plant.recover(at, 0), f"recovered at {at.short}")


def _limit(plant: Plant, bytes_per_s: int | None) -> None:
    path = limits.LIMIT.format(name=limits.TOTAL)
    if bytes_per_s is None:
        plant.client.ask("DELETE", path)
    else:
        plant.client.ask("PUT", path, body=limits.LimitRule(bytes_per_s=bytes_per_s))


def _shown(plant: Plant) -> limits.MachineLimit:
    return plant.client.get(limits.LimitsAnswer, limits.LIMITS).machines[0]
