"""Agent, drainer, server and replay killed at random moments under load: all come back by themselves, what was
acknowledged stays, every recovery point is a state that the disks had, and the ends are equal."""

from __future__ import annotations

import random

import pytest

from journal.position import Position
from journal.segment import Flags
from tests.harness.load import Churn
from tests.harness.plant import Plant, new_seed

SIZES = (48 << 20, 48 << 20)
OPS_PER_S = 60
GENTLE_OPS_PER_S = 20
"""An agent that is killed before it has started properly seals nothing: until it lives for a few seconds, the raw spool
has to hold what is written."""
KILLS_EACH = 50
RING_BYTES = 64 << 20
"""What the load writes while the drainer starts again on a busy machine."""
PAUSE_S = (0.05, 1.5)
CHECKED_POINTS = 12


@pytest.mark.real
@pytest.mark.timeout(600)
def test_everything_killed_under_load_resumes_and_loses_nothing() -> None:
    seed = new_seed()
    rng = random.Random(seed)
    with Plant(sizes=SIZES, ring_bytes=RING_BYTES) as plant:
        churn = plant.churn("load", seed, OPS_PER_S, "mixed")
        plant.start_all()
        plant.wait_recovery_point()
        churn.start()
        victims = ["agent", "drainer", "server", "replay"] * KILLS_EACH
        rng.shuffle(victims)
        acknowledged: list[Position] = []
        for victim in victims:
            churn.run_for(rng.uniform(*PAUSE_S))
            try:
                acknowledged.append(plant.tip())
            except OSError:
                # The server is down or about to be: nothing is acknowledged now.
                assert plant.server.starts > 1
            plant.kill(victim)
        churn.stop()
        last = plant.settle(deadline_s=90)
        plant.wait_applied(last, deadline_s=90)
        missing = [position.short for position in acknowledged if not plant.contains(position)]
        assert not missing, f"acknowledged, then lost: {missing}"
        assert len(acknowledged) > len(victims) // 2
        _check_points(plant, churn, last)
        print(
            f"{len(victims)} kills, {len(set(acknowledged))} acknowledged positions kept, {churn.operations} operations"
        )
        plant.check_no_crash()


@pytest.mark.real
@pytest.mark.timeout(400)
def test_killing_the_agent_alone_loses_no_second() -> None:
    seed = new_seed()
    rng = random.Random(seed)
    with Plant(sizes=SIZES, ring_bytes=RING_BYTES) as plant:
        churn = plant.churn("load", seed, GENTLE_OPS_PER_S, "mixed")
        plant.start_all()
        first = plant.wait_recovery_point()
        churn.start()
        for number in range(KILLS_EACH):
            if number % 2:
                # On a busy machine a second is not enough to start: every other one is killed at work.
                plant.wait_progress()
            churn.run_for(rng.uniform(*PAUSE_S))
            plant.kill("agent")
        churn.stop()
        last = plant.settle(deadline_s=60)
        plant.wait_applied(last, deadline_s=60)
        fuzzy = [header for header in plant.history() if header.flags & Flags.FUZZY and header.position > first]
        assert plant.agent_report().lost_events == 0
        assert not fuzzy, f"{len(fuzzy)} fuzzy segments although only the agent was killed"
        _check_points(plant, churn, last)
        plant.check_no_crash()


def _check_points(plant: Plant, churn: Churn, last: Position) -> None:
    offered = [position for position in plant.recovery_points() if position <= last]
    step = max(1, len(offered) // CHECKED_POINTS)
    for position in [*offered[:-1:step], last]:
        pair = plant.recover_all(position)
        churn.explain(pair, plant.sealed_ns(position))
        if position == last:
            plant.check_ends_equal(position, pair)
        for image in pair:
            image.unlink()
