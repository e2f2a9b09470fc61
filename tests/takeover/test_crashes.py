"""Exactly one thing breaks, at every call there is; then seeded schedules in which anything breaks at any time.

Each call of the controller to the outside (its record store included) is broken before and after its effect, in each
way. The controller killed after an intent was stored is the kill after a ``save``; killed before the result was stored,
the one before it.
"""

from __future__ import annotations

import os
import random

import pytest

from standby.takeover.record import Options, TakeoverRecord
from standby.takeover.states import Mode, State
from tests.takeover.operator import Operator, check_end
from tests.takeover.test_controller import At
from tests.takeover.virtual_time import run
from tests.takeover.world import Fault, World

SCENES = ("planned", "planned-without-quiesce", "planned-then-rollback", "no-automatic-rollback", "unplanned")
KINDS = ("kill", "error", "flaky", "hang")
PE_KINDS = ("restart-pe", "reset-pe")
SCHEDULES = int(os.environ.get("CDP_TAKEOVER_SCHEDULES", "1200"))


def scene(name: str, world: World) -> Operator:
    """The operator of a scene; the world is put into its beginning."""
    for _ in range(20):
        world.tick()
    if name == "unplanned":
        world.source.alive = False
        return Operator(world, Mode.UNPLANNED, Options(source_is_down=True))
    operator = Operator(world, Mode.PLANNED)
    operator.rolls_back = name == "planned-then-rollback"
    return operator


def world_of(name: str, faults: object) -> World:
    changes: dict[str, object] = {}
    if name == "planned-without-quiesce":
        changes["quiesce"] = "none"
    if name == "no-automatic-rollback":
        changes["automatic_rollback"] = False
    return World(faults, **changes)  # type: ignore[arg-type]


def play(name: str, faults: object) -> tuple[World, TakeoverRecord]:
    async def go() -> tuple[World, TakeoverRecord]:
        world = world_of(name, faults)
        return world, await scene(name, world).until_rest()

    return run(go())


def calls_of(name: str) -> list[str]:
    return play(name, At({}))[0].calls


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", [*KINDS, *PE_KINDS])
@pytest.mark.parametrize("name", SCENES)
def test_one_fault_at_every_call(name: str, kind: str, when: str) -> None:
    for number, call in enumerate(calls_of(name), start=1):
        if kind in ("hang", "flaky") and call == "save":
            continue  # the record store is local: it stores or fails
        if kind == "hang" and call in ("live", "started", "start_generation", "last_recovery_point"):
            continue  # so is the store
        try:
            world, record = play(name, At({number: (kind, when)}))
            check_end(world, record)
        except BaseException:
            print(f"scene {name}, call {number} ({call}), {kind} {when}")
            raise


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", SCENES)
def test_killed_at_every_pair_of_calls(name: str, when: str) -> None:
    """The second controller is killed too, at each of the first calls of its life."""
    count = len(calls_of(name))
    for first in range(1, count + 1, 2):
        for second in range(first + 1, first + 9, 2):
            try:
                world, record = play(name, At({first: ("kill", when), second: ("kill", when)}))
                check_end(world, record)
            except BaseException:
                print(f"scene {name}, kills at {first} and {second} {when}")
                raise


class Random:
    """Each call breaks with a probability that the seed chooses, until there were enough faults."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._rate = self._random.choice((0.02, 0.05, 0.15, 0.4))
        self._left = self._random.randint(1, 12)
        everything = (*KINDS, *PE_KINDS, "die")
        self._kinds = self._random.choice(
            (("kill",), KINDS, ("error", "flaky"), ("kill", "flaky"), PE_KINDS, ("kill", *PE_KINDS), everything)
        )

    def __call__(self, call: str, number: int) -> Fault | None:
        if self._left == 0 or self._random.random() > self._rate:
            return None
        kind = self._random.choice(self._kinds)
        local = call in ("live", "started", "start_generation", "last_recovery_point", "save")
        if (local and kind in ("hang", "flaky")) or (kind == "die" and call in ("thaw", "save")):
            return None
        self._left -= 1
        return kind, self._random.choice(("before", "after"))


def test_random_schedules() -> None:
    states: dict[State, int] = {}
    base = int(os.environ.get("CDP_TAKEOVER_SEED", "20261123"))
    for seed in range(base, base + SCHEDULES):
        name = random.Random(seed).choice(SCENES)
        try:
            world, record = play(name, Random(seed))
            check_end(world, record)
        except BaseException:
            print(f"scene {name}; replay with CDP_TAKEOVER_SEED={seed} CDP_TAKEOVER_SCHEDULES=1")
            raise
        states[record.state] = states.get(record.state, 0) + 1
    print(f"{SCHEDULES} schedules from seed {base}: { ({state.value: count for state, count in states.items()}) }")
    assert SCHEDULES < 1000 or {State.RUNNING, State.FAILED, State.ROLLED_BACK} <= set(states)
