"""Takeovers in a world in which nothing breaks, or exactly one thing does."""

from __future__ import annotations

import pytest

from standby.takeover.drive import UNPREPARED_MAX
from standby.takeover.record import Options, TakeoverRecord
from standby.takeover.states import Act, Mode, Outcome, State
from tests.takeover.operator import Operator, check_end
from tests.takeover.virtual_time import run
from tests.takeover.world import Fault, World


class At:
    """Faults at numbered calls, as in ``At({7: ("kill", "after")})``; ``call`` picks one by its name instead."""

    def __init__(self, numbers: dict[int, Fault], call: str | None = None) -> None:
        self.numbers, self.call = dict(numbers), call
        self._seen = 0

    def __call__(self, call: str, number: int) -> Fault | None:
        if self.call is not None:
            if call != self.call:
                return None
            self._seen += 1
            number = self._seen
        return self.numbers.pop(number, None)


class Several:
    """The first of these that has a fault for a call."""

    def __init__(self, *faults: At) -> None:
        self._faults = faults

    def __call__(self, call: str, number: int) -> Fault | None:
        return next((fault for one in self._faults if (fault := one(call, number)) is not None), None)


def always(call: str, kind: str = "error", when: str = "before") -> At:
    return At(dict.fromkeys(range(1, 500), (kind, when)), call)


def take_over(
    mode: Mode, faults: At | Several | None = None, *, options: Options | None = None, source_dead: bool = False,
    rolls_back: bool = False, **spec: object,
) -> tuple[World, TakeoverRecord]:  # fmt: skip
    async def play() -> tuple[World, TakeoverRecord]:
        world = World(faults or At({}), **spec)
        for _ in range(20):
            world.tick()
        world.source.alive = not source_dead
        operator = Operator(world, mode, options)
        operator.rolls_back = rolls_back
        return world, await operator.until_rest()

    return run(play())


def test_planned() -> None:
    world, record = take_over(Mode.PLANNED)
    assert record.state is State.RUNNING
    check_end(world, record)
    order = [call for call in world.calls if call in ("quiesce", "seal", "fence", "start_generation", "finish_boot")]
    assert order == ["quiesce", "seal", "fence", "start_generation", "finish_boot"]
    assert record.downtime_s is not None and 0 < record.downtime_s < 1
    assert list(record.phase_seconds) == ["check", "quiesce", "seal", "fence", "drain", "ip-drift", "inject",
                                          "finish-boot", "probe"]  # fmt: skip


def test_drain_and_address_overlap() -> None:
    _, record = take_over(Mode.PLANNED)
    drain, address = record.last(Act.DRAIN), record.last(Act.TAKE_ADDRESS)
    assert drain is not None and address is not None and drain.ended_s is not None
    assert address.started_s < drain.ended_s


@pytest.mark.parametrize("mode", ["none", "freeze", "hooks", "postgresql"])
def test_planned_loses_nothing_whatever_the_quiesce_mode(mode: str) -> None:
    world, record = take_over(Mode.PLANNED, quiesce=mode)
    check_end(world, record)


def test_unplanned() -> None:
    world, record = take_over(Mode.UNPLANNED, source_dead=True)
    assert record.state is State.RUNNING and "quiesce" not in world.calls
    check_end(world, record)


def test_unplanned_is_refused_while_the_source_reports() -> None:
    world, record = take_over(Mode.UNPLANNED)
    assert record.state is State.FAILED and record.reason is not None and record.reason["code"] == "source-alive"
    check_end(world, record)


def test_unplanned_is_refused_while_somebody_answers_at_the_address() -> None:
    world, record = take_over(Mode.UNPLANNED, options=Options(source_is_down=True))
    assert record.reason is not None and record.reason["code"] == "source-alive"
    assert record.reason["fields"]["answering"] == {"10.0.0.100": "neighbour"} and record.reason["remedy"]
    check_end(world, record)


def test_unplanned_destroys_a_source_that_is_a_domain() -> None:
    source = {"hypervisor": "test:///", "domain": "source"}
    from standby.spec import SourceDomain  # noqa: PLC0415

    world, record = take_over(Mode.UNPLANNED, source_domain=SourceDomain(**source))
    assert record.state is State.RUNNING and not world.source.alive
    check_end(world, record)


@pytest.mark.parametrize("call", ["quiesce", "seal", "fence", "start_generation"])
def test_failure_before_the_point_of_no_return_is_undone(call: str) -> None:
    for kind in ("error", "hang"):
        if (call, kind) == ("start_generation", "hang"):
            continue
        world, record = take_over(Mode.PLANNED, always(call, kind))
        assert record.state is State.FAILED, (kind, record.state)
        check_end(world, record)


@pytest.mark.parametrize("call", ["drain", "inject", "take_address", "finish_boot", "serving"])
def test_failure_after_the_point_of_no_return_rolls_back(call: str) -> None:
    for kind in ("error", "hang", "flaky"):
        world, record = take_over(Mode.PLANNED, always(call, kind))
        assert record.state is State.ROLLED_BACK, kind
        check_end(world, record)


def test_without_automatic_rollback_it_stalls_and_a_retry_goes_on() -> None:
    world, record = take_over(Mode.PLANNED, At({1: ("error", "before")}, "inject"), automatic_rollback=False)
    assert record.state is State.RUNNING
    check_end(world, record)


def test_unplanned_never_rolls_back() -> None:
    world, record = take_over(Mode.UNPLANNED, At({1: ("error", "before")}, "inject"), source_dead=True)
    assert record.state is State.RUNNING
    check_end(world, record)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("call", ["start_generation", "drain", "inject", "take_address", "finish_boot"])
@pytest.mark.parametrize("kind", ["restart-pe", "reset-pe"])
@pytest.mark.parametrize("mode", list(Mode))
def test_a_pe_that_restarted_is_drained_and_injected_again(mode: Mode, kind: str, call: str, when: str) -> None:
    world, record = take_over(mode, At({1: (kind, when)}, call), source_dead=mode is Mode.UNPLANNED)
    # A reset while it is told leaves it open whether it ran: planned goes back, unplanned a person boots its disk.
    goes_back = mode is Mode.PLANNED and (kind, call) == ("reset-pe", "finish_boot")
    assert record.state is (State.ROLLED_BACK if goes_back else State.RUNNING), record.reason
    assert world.calls.count("finish_boot") - 1 <= world.calls.count("inject") <= 2
    check_end(world, record)


def test_a_standby_that_was_reset_after_it_was_told_is_not_written_to() -> None:
    """It may have run: nobody but a person can tell. Planned goes back; the domain had not been redefined yet."""
    faults = Several(always("redefine"), At({1: ("reset-pe", "after")}, "finish_boot"))
    world, record = take_over(Mode.PLANNED, faults)
    assert record.state is State.ROLLED_BACK and record.reason is not None
    assert record.reason["code"] == "standby-reset" and world.spec.domain_name in record.reason["remedy"]
    check_end(world, record)


@pytest.mark.parametrize("call", ["save", "destroy", "start_pe", "drain", "inject"])
def test_a_controller_that_is_killed_while_the_domain_is_switched_back_goes_on(call: str) -> None:
    """The PE ends between its answer and the kexec, when the domain would boot from its disk already."""
    for number in range(1, 40):
        for when in ("before", "after"):
            kill = At({number: ("kill", when)}, call)
            world, record = take_over(
                Mode.UNPLANNED, Several(At({1: ("restart-pe", "after")}, "finish_boot"), kill), source_dead=True
            )
            assert record.state is State.RUNNING, record.reason
            check_end(world, record)
        if kill.numbers:
            return


def test_a_pe_that_keeps_restarting_stalls_and_a_retry_goes_on() -> None:
    faults = At(dict.fromkeys(range(1, UNPREPARED_MAX + 4), ("restart-pe", "before")), "finish_boot")
    world, record = take_over(Mode.UNPLANNED, faults, source_dead=True)
    assert record.state is State.RUNNING
    assert [entry.outcome for entry in record.entries if entry.act is Act.FINISH_BOOT].count(Outcome.RETRIED) == 1
    check_end(world, record)


@pytest.mark.parametrize("call", ["redefine", "start_pe"])
def test_what_the_service_does_not_need_is_a_warning(call: str) -> None:
    world, record = take_over(Mode.PLANNED, always(call), rolls_back=call == "start_pe")
    assert record.state is (State.ROLLED_BACK if call == "start_pe" else State.RUNNING)
    assert record.warnings and record.warnings[0]["code"] == "broken"
    check_end(world, record)


def test_rollback_by_the_operator() -> None:
    world, record = take_over(Mode.PLANNED, rolls_back=True)
    assert record.state is State.ROLLED_BACK and world.rolled_back_rows
    check_end(world, record)
    assert [time.phase for time in record.timeline()][-1] is State.ROLLING_BACK
