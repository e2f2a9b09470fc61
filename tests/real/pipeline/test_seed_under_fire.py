"""A device that is rewritten from end to end while it is seeded: nothing is offered before the seed is closed, and
what is offered then is a state that the disks had."""

from __future__ import annotations

import os

import pytest

from tests.harness.plant import Plant, new_seed
from tests.harness.wait import wait_until

pytestmark = [pytest.mark.real, pytest.mark.timeout(240)]

SIZES = (112 << 20, 80 << 20)
OPS_PER_S = 120
"""Of 256 KiB each: both disks are rewritten in less than the seed takes at this rate."""
COPY_MB_PER_S = 20
AFTER_SEED_OPS = 600


def test_a_device_rewritten_during_its_seed_ends_equal() -> None:
    seed = new_seed()
    with Plant(sizes=SIZES, copy_mb_per_s=COPY_MB_PER_S) as plant:
        for disk in plant.disks:
            disk.device.write_bytes(os.urandom(disk.size_bytes))
        churn = plant.churn("fire", seed, OPS_PER_S, "sweep")
        churn.start()
        began = churn.operations
        plant.start_all()

        seen_fuzzy = 0

        def closed() -> bool:
            nonlocal seen_fuzzy
            state = plant.state()
            assert state.fuzzy == (state.recovery_point is None), "a recovery point is offered inside the seed"
            seen_fuzzy += state.fuzzy
            return not state.fuzzy

        wait_until(closed, 120, "the end of the seed", poll_s=0.1)
        during = (churn.operations - began) * (256 << 10)
        assert during > sum(SIZES), f"only {during} bytes were rewritten during the seed"
        assert seen_fuzzy > 10
        first = plant.wait_recovery_point()
        ended = churn.operations + AFTER_SEED_OPS
        wait_until(lambda: churn.operations > ended, 60, "more of the load")
        churn.stop()
        last = plant.settle()
        plant.wait_applied(last)

        offered = [position for position in plant.recovery_points() if position <= last]
        assert offered[0] == first
        print(f"{during >> 20} MiB rewritten during the seed; {len(offered)} recovery points after it")
        for position in (first, *offered[1 : -1 : max(1, len(offered) // 4)], last):
            pair = plant.recover_all(position)
            churn.explain(pair, plant.sealed_ns(position))
            if position == last:
                plant.check_ends_equal(position, pair)
            for image in pair:
                image.unlink()
        plant.check_no_crash()
