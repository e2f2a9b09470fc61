"""What an operator and the rest of the server do to a controller while it works."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from standby.takeover.controller import TakeoverController
from standby.takeover.errors import TakeoverActive, TakeoverRefused, TakeoverUnknown
from standby.takeover.states import Act, Mode, StandbyState, State, standby_state
from tests.takeover.operator import check_end
from tests.takeover.peers import Records, ports
from tests.takeover.test_controller import At, always
from tests.takeover.virtual_time import run
from tests.takeover.world import MACHINE, World

Play = Callable[[TakeoverController, World], Awaitable[None]]


def with_controller(play: Play, faults: At | None = None, **spec: object) -> None:
    async def go() -> None:
        world = World(faults or At({}), **spec)
        async with TakeoverController(Records(world), ports(world)) as controller:
            await play(controller, world)
        assert not world.violations

    run(go())


def test_one_active_takeover_per_machine() -> None:
    async def play(controller: TakeoverController, world: World) -> None:
        first, second = await asyncio.gather(
            controller.take_over(world.spec, Mode.PLANNED, actor="a"),
            controller.take_over(world.spec, Mode.UNPLANNED, actor="b"),
            return_exceptions=True,
        )
        assert not isinstance(first, BaseException) and isinstance(second, TakeoverActive)
        with pytest.raises(TakeoverActive, match="active"):
            await controller.take_over(world.spec, Mode.PLANNED, actor="c")
        await controller.settled(first.id)
        with pytest.raises(TakeoverActive, match="running"):
            await controller.take_over(world.spec, Mode.PLANNED, actor="d")

    with_controller(play)


def test_commit_ends_it() -> None:
    async def play(controller: TakeoverController, world: World) -> None:
        record = await controller.take_over(world.spec, Mode.PLANNED, actor="a")
        with pytest.raises(TakeoverRefused):
            await controller.commit(record.id)
        await controller.settled(record.id)
        assert (await controller.commit(record.id)).state is State.COMMITTED
        with pytest.raises(TakeoverRefused):
            await controller.rollback(record.id)
        assert controller.standby_owns(MACHINE)

    with_controller(play)


def test_the_window_commits_by_itself() -> None:
    async def play(controller: TakeoverController, world: World) -> None:
        record = await controller.take_over(world.spec, Mode.PLANNED, actor="a")
        await controller.settled(record.id)
        await asyncio.sleep(59)
        assert await controller.commit_expired() == []
        await asyncio.sleep(2)
        assert await controller.commit_expired() == [record.id]
        assert controller.record(record.id).state is State.COMMITTED

    with_controller(play, rollback_window_s=60.0)


def test_who_owns_the_address() -> None:
    async def play(controller: TakeoverController, world: World) -> None:
        assert not controller.standby_owns(MACHINE)
        record = await controller.take_over(world.spec, Mode.PLANNED, actor="a")
        owner = [
            (shown.begun(Act.GENERATION), controller.standby_owns(MACHINE))
            async for shown in controller.changes(record.id)
        ]
        assert all(begun == owns for begun, owns in owner) and owner[-1] == (True, True)
        await controller.rollback(record.id)
        async for shown in controller.changes(record.id):
            assert controller.standby_owns(MACHINE) != shown.done(Act.GENERATION_BACK)
        assert not controller.standby_owns(MACHINE)

    with_controller(play)


def test_a_failed_one_changes_no_owner() -> None:
    async def play(controller: TakeoverController, world: World) -> None:
        record = await controller.take_over(world.spec, Mode.PLANNED, actor="a")
        assert (await controller.settled(record.id)).state is State.FAILED
        assert not controller.standby_owns(MACHINE)
        check_end(world, controller.record(record.id))

    with_controller(play, always("start_generation"))


@pytest.mark.parametrize("act", [Act.QUIESCE, Act.SEAL, Act.FENCE_SOURCE, Act.DRAIN, Act.INJECT, Act.PROBE])
def test_rollback_at_any_time_leads_back(act: Act) -> None:
    async def play(controller: TakeoverController, world: World) -> None:
        record = await controller.take_over(world.spec, Mode.PLANNED, actor="a")
        async for shown in controller.changes(record.id):
            if shown.begun(act) and not shown.rollback_requested and shown.direction.value == "forward":
                await controller.rollback(record.id)
        ended = await controller.settled(record.id)
        assert ended.state in (State.FAILED, State.ROLLED_BACK)
        check_end(world, ended)

    with_controller(play)


def test_a_peer_that_comes_back_lets_the_undo_go_on() -> None:
    async def play(controller: TakeoverController, world: World) -> None:
        record = await controller.take_over(world.spec, Mode.PLANNED, actor="a")
        async for shown in controller.changes(record.id):
            if shown.begun(Act.SEAL):
                world.source.connected = False
        stalled = controller.record(record.id)
        assert stalled.state is State.UNDOING and stalled.stalled is not None and stalled.stalled["remedy"]
        world.source.connected = True
        await controller.peer_connected(MACHINE)
        ended = await controller.settled(record.id)
        assert ended.state is State.FAILED
        check_end(world, ended)

    with_controller(play)


def test_a_standby_that_is_not_ready_changes_nothing() -> None:
    async def play(controller: TakeoverController, world: World) -> None:
        world.standby.connected = False
        record = await controller.take_over(world.spec, Mode.PLANNED, actor="a")
        ended = await controller.settled(record.id)
        assert ended.state is State.FAILED and ended.reason is not None and ended.reason["code"] == "not-ready"
        assert "PE is not connected" in ended.reason["sentence"]
        assert {"quiesce", "seal", "fence", "start_generation"}.isdisjoint(world.calls)

    with_controller(play)


def test_a_domain_that_could_not_be_redefined_is_tried_again() -> None:
    async def play(controller: TakeoverController, world: World) -> None:
        record = await controller.take_over(world.spec, Mode.PLANNED, actor="a")
        shown = await controller.settled(record.id)
        assert shown.state is State.RUNNING
        assert [warning["code"] for warning in shown.warnings] == ["broken"]
        assert await controller.commit_expired() == []
        mended = controller.record(record.id)
        assert (mended.state, mended.warnings) == (State.RUNNING, [])
        assert world.calls.count("redefine") == 2
        await controller.commit(record.id)

    with_controller(play, At({1: ("error", "before")}, "redefine"))


def test_unknown_takeover() -> None:
    async def play(controller: TakeoverController, world: World) -> None:
        with pytest.raises(TakeoverUnknown):
            await controller.commit("nosuch")

    with_controller(play)


def test_the_standbys_state_to_show() -> None:
    assert standby_state("ready", None) is StandbyState.READY
    assert standby_state(None, None) is StandbyState.DEFINED
    assert standby_state("ready", State.DRAIN) is StandbyState.TAKING_OVER
    assert standby_state("ready", State.DRAIN, stalled=True) is StandbyState.FAILED
    assert standby_state(None, State.COMMITTED) is StandbyState.COMMITTED
    assert standby_state(None, State.ROLLED_BACK) is StandbyState.ROLLED_BACK
    assert standby_state("seeding", State.ROLLED_BACK) is StandbyState.SEEDING
    assert standby_state("ready", State.FAILED) is StandbyState.READY
