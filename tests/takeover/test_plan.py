"""Every state that the planner can reach, and every way on from there: a walk over all of them.

An act that was started may end in any outcome at any time, the controller may die at any time, the operator may ask to
go back, and the store may or may not have started the generation of an act that did not report. Whatever happens, the
invariants hold and there is a next step until the takeover is at rest.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from journal.errors import CdpError
from standby.takeover.errors import IllegalTransition, TakeoverRefused
from standby.takeover.plan import (
    ATTEMPTS_MAX,
    NEVER_CANCELLED,
    OPTIONAL,
    PLANNED,
    ROLLBACK,
    UNDO,
    UNPLANNED,
    Cancel,
    Observed,
    Settle,
    Stall,
    Start,
    Turn,
    Wait,
    check_command,
    check_invariants,
    graph_of,
    lease_s,
    needs_bumped,
    next_step,
    state_of,
)
from standby.takeover.record import Options, TakeoverRecord
from standby.takeover.states import AT_REST, PHASES, TERMINAL, TRANSITIONS, Act, Direction, Mode, Outcome, State
from tests.takeover.world import MACHINE, spec

CUT = "00000001-0000000000000007-" + "ab" * 32
STATES_MAX = 200_000


def fresh(mode: Mode, **changes: object) -> TakeoverRecord:
    return TakeoverRecord(
        id="t1", machine=MACHINE, mode=mode, actor="test", created_s=0.0, spec=spec(**changes), generation=2
    )


class Node:
    """A record and what is really so: may the generation be live?"""

    def __init__(self, record: TakeoverRecord, live: bool) -> None:
        self.record, self.live = record, live

    def key(self) -> tuple[object, ...]:
        record = self.record
        outcomes = tuple(
            (act, None if (entry := record.last(act)) is None else entry.outcome or "pending") for act in Act
        )
        return record.state, record.direction, record.stalled is None, record.rollback_requested, self.live, outcomes

    def fork(self) -> Node:
        return Node(TakeoverRecord.decode(self.record.encode()), self.live)

    def changed(self) -> Node:
        """What the drive does after every change."""
        record = self.record
        if record.active or (record.state is State.RUNNING and record.direction is Direction.ROLLBACK):
            record.move(state_of(record))
        check_invariants(record)
        return self


def end(node: Node, act: Act, outcome: Outcome) -> Node:
    after = node.fork()
    entry = after.record.last(act)
    assert entry is not None
    entry.outcome, entry.ended_s = outcome, 1.0
    if outcome is Outcome.FAILED:
        entry.error = {"code": "broken"}
    if outcome is Outcome.UNPREPARED:
        after.record.unprepare()
    if outcome is Outcome.DONE and act is Act.CUT:
        after.record.cut = CUT
        entry.evidence = {"position": CUT}
    if outcome is Outcome.DONE and act is Act.GENERATION:
        after.live = True
    return after


def events(node: Node) -> Iterator[Node]:
    """What can happen by itself: results, the controller's death, the operator."""
    record = node.record
    pending = [act for act in Act if record.pending(act)]
    for act in pending:
        for outcome in (Outcome.DONE, Outcome.FAILED):
            yield end(node, act, outcome).changed()
        if act is Act.FINISH_BOOT or (act is Act.PROBE and not record.pending(Act.REDEFINE)):
            yield end(node, act, Outcome.UNPREPARED).changed()
        if act is Act.GENERATION:  # it took effect, but failed to say so
            lost = end(node, act, Outcome.FAILED)
            lost.live = True
            yield lost.changed()
    if pending:
        for live in {node.live, node.live or Act.GENERATION in pending}:
            killed = node.fork()
            killed.live = live
            for act in pending:
                killed = end(killed, act, Outcome.INTERRUPTED)
                killed.live = live
            yield killed.changed()
    if record.stalled is not None:
        retried = node.fork()
        retried.record.reopen()
        yield retried.changed()
    if record.mode is Mode.PLANNED and record.direction is Direction.FORWARD and not record.rollback_requested:
        try:
            check_command(record, "rollback", 1.0)
        except CdpError:
            return
        asked = node.fork()
        asked.record.rollback_requested = True
        yield asked.changed()


def step(node: Node) -> Node | None:
    """Follow the planner once; None if it only waits, or is at the end."""
    record = node.record
    if record.state in AT_REST and not record.rollback_requested:
        return None
    if record.state in TERMINAL or record.stalled is not None:
        return None
    bumped = node.live if needs_bumped(record, 1.0) else None
    after = node.fork()
    match next_step(Observed(record, 1.0, bumped)):
        case Start(acts):
            assert acts
            for act in acts:
                after.record.begin(act, 1.0)
        case Wait():
            assert any(record.pending(act) for act in Act), "waits for nothing"
            return None
        case Cancel(acts):
            assert acts and not set(acts) & NEVER_CANCELLED
            for act in acts:
                after = end(after, act, Outcome.CANCELLED)
        case Turn(direction, reason):
            assert reason and direction is not record.direction
            assert (direction is Direction.ROLLBACK) == node.live, "the wrong way back"
            after.record.direction = direction
        case Settle(state, _):
            assert not any(record.pending(act) for act in Act)
            assert state is not State.FAILED or not node.live, "given up although the generation is live"
            after.record.move(state)
        case Stall(reason):
            assert reason and not any(record.pending(act) for act in Act)
            after.record.stalled = reason
    return after.changed()


def attempts_small(node: Node) -> bool:
    """Kills are bounded: two per act show everything that more would."""
    counts: dict[Act, int] = {}
    for entry in node.record.entries:
        counts[entry.act] = counts.get(entry.act, 0) + 1
    return max(counts.values(), default=0) <= 2


@pytest.mark.parametrize("automatic", [True, False])
@pytest.mark.parametrize("mode", list(Mode))
def test_every_reachable_state_keeps_the_invariants(mode: Mode, automatic: bool) -> None:
    start = Node(fresh(mode, automatic_rollback=automatic), live=False)
    seen, todo = {start.key()}, [start]
    ends: dict[str, int] = {}
    while todo:
        node = todo.pop()
        following = [*events(node)]
        if (after := step(node)) is not None:
            following.append(after)
        if not following or node.record.stalled is not None:
            rest = "stalled" if node.record.stalled is not None else node.record.state.value
            assert node.record.stalled is not None or node.record.state in AT_REST, node.record
            ends[rest] = ends.get(rest, 0) + 1
        for one in following:
            if one.key() not in seen and attempts_small(one):
                seen.add(one.key())
                todo.append(one)
        assert len(seen) < STATES_MAX
    print(f"{mode}, automatic rollback {automatic}: {len(seen)} states, ends {ends}")
    assert "running" in ends or mode is Mode.PLANNED  # a planned one that runs can still be rolled back
    assert ("rolled-back" in ends) == (mode is Mode.PLANNED)


@pytest.mark.parametrize("graph", [PLANNED, UNPLANNED, UNDO, ROLLBACK])
def test_graphs_have_no_cycle_and_no_loose_end(graph: dict[Act, frozenset[Act]]) -> None:
    done: set[Act] = set()
    while ready := [act for act in graph if act not in done and graph[act] <= done]:
        done.update(ready)
    assert done == set(graph)
    assert all(need not in OPTIONAL for needs in graph.values() for need in needs), "an optional act is needed"


def test_transition_table_reaches_everything_and_ends() -> None:
    reached, todo = {State.CHECK}, [State.CHECK]
    while todo:
        for state in TRANSITIONS[todo.pop()] - reached:
            reached.add(state)
            todo.append(state)
    assert reached == set(State)
    assert {State.COMMITTED, State.ROLLED_BACK, State.FAILED} == TERMINAL
    back = {(phase, later) for index, phase in enumerate(PHASES) for later in TRANSITIONS[phase]
            if later in PHASES[:index]}  # fmt: skip
    assert back == {(State.FINISH_BOOT, State.DRAIN), (State.PROBE, State.DRAIN)}, "only for a PE that was restarted"


def test_states_are_set_through_the_table_only() -> None:
    record = fresh(Mode.PLANNED)
    with pytest.raises(IllegalTransition, match="check to running"):
        record.move(State.RUNNING)


def test_a_source_that_may_have_thawed_is_not_taken_over() -> None:
    record = fresh(Mode.PLANNED)
    for act in (Act.CHECK, Act.QUIESCE, Act.SEAL, Act.FENCE_SOURCE):
        entry = record.begin(act, 10.0)
        entry.outcome, entry.ended_s = Outcome.DONE, 10.0
    late = 10.0 + lease_s(record.spec) + 1.0
    assert isinstance(next_step(Observed(record, late, False)), Start), "it was fenced in time: no hurry"
    record.entries[-1].ended_s = late
    turn = next_step(Observed(record, late, False))
    assert isinstance(turn, Turn) and turn.reason["code"] == "quiesce-lease-expired"


def test_acts_that_never_end_are_given_up() -> None:
    record = fresh(Mode.UNPLANNED)
    for _ in range(ATTEMPTS_MAX):
        record.begin(Act.CHECK, 1.0).outcome = Outcome.INTERRUPTED
    assert isinstance(next_step(Observed(record, 1.0, False)), Settle)


def test_an_unknown_generation_stalls_rather_than_guesses() -> None:
    record = fresh(Mode.PLANNED)
    for act in (Act.CHECK, Act.QUIESCE, Act.SEAL, Act.FENCE_SOURCE, Act.CUT):
        record.begin(act, 1.0).outcome = Outcome.DONE
    record.cut = CUT
    record.begin(Act.GENERATION, 1.0).outcome = Outcome.FAILED
    assert isinstance(next_step(Observed(record, 1.0, None)), Stall)


@pytest.mark.parametrize(
    ("state", "command", "why"),
    [
        (State.PROBE, "commit", "not running"),
        (State.RUNNING, "retry", "not stalled"),
        (State.COMMITTED, "rollback", "it is committed"),
        (State.FAILED, "rollback", "it is failed"),
    ],
)
def test_commands_are_refused_with_a_reason(state: State, command: str, why: str) -> None:
    record = fresh(Mode.PLANNED)
    record.state = state
    with pytest.raises(TakeoverRefused, match=why) as caught:
        check_command(record, command, 0.0)
    assert caught.value.remedy


def test_rollback_is_for_planned_ones_within_their_window() -> None:
    unplanned = fresh(Mode.UNPLANNED)
    unplanned.state = State.RUNNING
    with pytest.raises(TakeoverRefused, match="unplanned"):
        check_command(unplanned, "rollback", 0.0)
    planned = fresh(Mode.PLANNED, rollback_window_s=60.0)
    planned.state, planned.running_s = State.RUNNING, 100.0
    check_command(planned, "rollback", 159.0)
    with pytest.raises(TakeoverRefused, match="window"):
        check_command(planned, "rollback", 161.0)


def test_a_record_survives_its_encoding() -> None:
    record = fresh(Mode.PLANNED)
    record.options = Options(force=True)
    record.begin(Act.CHECK, 1.5).outcome = Outcome.DONE
    assert TakeoverRecord.decode(record.encode()) == record
    assert graph_of(TakeoverRecord.decode(record.encode())) == PLANNED
    with pytest.raises(CdpError, match="cannot be read"):
        TakeoverRecord.decode(record.encode()[:-5])
