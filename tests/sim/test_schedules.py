"""Many seeded schedules of the whole pipeline, from the sealed segment to the flushed block.

CDP_SIM_SEED=n pytest tests/sim/test_schedules.py::test_schedules   plays one schedule, as a failure names it
CDP_SIM_SCHEDULES=n pytest tests/sim                                plays that many
"""

from __future__ import annotations

import os
from typing import Final

import pytest

from tests.sim.mutants import MUTANTS
from tests.sim.world import World, play

SCHEDULES: Final = int(os.environ.get("CDP_SIM_SCHEDULES", "2000"))
SEED: Final = os.environ.get("CDP_SIM_SEED")
BATCH: Final = 100
MUTANT_SEEDS_MAX: Final = 300
SEEDS: Final = range(int(SEED), int(SEED) + 1) if SEED is not None else range(SCHEDULES)


@pytest.mark.parametrize("start", SEEDS[::BATCH])
def test_schedules(start: int) -> None:
    reached = [_reach(play(seed)) for seed in SEEDS[start - SEEDS[0] :][:BATCH]]
    if len(reached) == BATCH:
        # A simulation in which nothing happens would pass too.
        totals = [sum(column) for column in zip(*reached, strict=True)]
        assert all(totals), f"acknowledged, drained, resynced, deaths of agent, server and standby: {totals}"


def _reach(world: World) -> tuple[int, ...]:
    agent, server, standby = world.agent, world.server, world.standby
    return (
        len(server.acknowledged),
        standby.drains,
        agent.resyncs,
        agent.deaths,
        server.incarnation - 1,
        standby.deaths,
    )


@pytest.mark.parametrize("name", MUTANTS)
def test_the_simulation_finds(name: str) -> None:
    for seed in range(MUTANT_SEEDS_MAX):
        try:
            play(seed, MUTANTS[name])
        except AssertionError as error:
            print(f"seed {seed}: {error}")
            return
    pytest.fail(f"not found within {MUTANT_SEEDS_MAX} schedules: {name}")


def test_a_seed_decides_everything() -> None:
    for seed in (3, 4, 5):
        first, again = play(seed), play(seed)
        assert first.trace == again.trace
        assert _reach(first) == _reach(again)
        assert [position.short for position in first.server.acknowledged] == [
            position.short for position in again.server.acknowledged
        ]
