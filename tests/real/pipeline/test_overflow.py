"""A ring that is far too small under a load without limit: fuzzy is shown, nothing false is offered, and the resync
closes it soon after the load's end. Twenty times."""

from __future__ import annotations

import time

import pytest

from journal.segment import Flags
from tests.harness.plant import Plant, new_seed

pytestmark = [pytest.mark.real, pytest.mark.timeout(500)]

RUNS = 20
RING_BYTES = 1 << 20
SIZES = (48 << 20, 32 << 20)
LOAD_S = 2.0
CLOSED_S_MAX = 20.0


def test_an_overflow_is_shown_and_closed_every_time() -> None:
    seed = new_seed()
    with Plant(sizes=SIZES, ring_bytes=RING_BYTES) as plant:
        plant.start_all()
        plant.wait_recovery_point()
        closed_s = []
        for run in range(RUNS):
            before = plant.settle()
            lost = plant.agent_report().lost_events
            churn = plant.churn(f"load-{run}", seed + run, 0, "mixed")
            churn.start()
            churn.run_for(LOAD_S)
            churn.stop()
            stopped = time.monotonic()
            last = plant.settle(deadline_s=60)
            closed_s.append(time.monotonic() - stopped)
            assert plant.agent_report().lost_events > lost, "the ring did not overflow: the proof proves nothing"
            since = [header for header in plant.history() if before < header.position <= last]
            assert any(header.flags & Flags.FUZZY for header in since), "writes were lost and nothing was fuzzy"
            plant.wait_applied(last)
            points = [header.position for header in since if header.is_recovery_point]
            # The first may lie within the load; those around the gap are the ones that could be false.
            for position in sorted({points[0], *points[-2:]}):
                pair = plant.recover_all(position)
                churn.explain(pair, plant.sealed_ns(position))
                if position == last:
                    plant.check_ends_equal(position, pair)
                for image in pair:
                    image.unlink()
        print(f"closed after {', '.join(f'{seconds:.1f}' for seconds in closed_s)} s")
        assert max(closed_s) < CLOSED_S_MAX
        plant.check_no_crash()
