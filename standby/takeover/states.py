"""The words of a takeover, and the one transition table.

                 planned                                 unplanned
    check        is everybody ready?                     is the standby ready?
    quiesce      services stopped or disks frozen        -
    seal         the last segment is cut and stored      -
    fence        the source gives the address up,        evidence that the source is gone,
                 then the next generation starts         then the next generation starts
    ── point of no return: the next generation ──
    drain        the standby has applied exactly the cut
    inject       drivers, names, configuration
    ip-drift     the standby holds the address
    finish-boot  kexec
    probe        the service answers
    running      serving; planned: may be rolled back within the window
    committed    final

Before the point of no return a failure leads to ``undoing`` and ``failed``: the source goes on as if nothing had
happened. After it, a planned takeover can go through ``rolling-back`` to ``rolled-back``; anything else *stalls* in its
state until a person retries.

Phases overlap (the standby takes the address while it drains), so a state is the first phase that has not ended, and
may skip those that have.
"""

from __future__ import annotations

from enum import StrEnum

from standby.takeover.errors import IllegalTransition


class Mode(StrEnum):
    PLANNED = "planned"
    UNPLANNED = "unplanned"


class Direction(StrEnum):
    FORWARD = "forward"
    UNDO = "undo"
    ROLLBACK = "rollback"


class State(StrEnum):
    CHECK = "check"
    QUIESCE = "quiesce"
    SEAL = "seal"
    FENCE = "fence"
    DRAIN = "drain"
    INJECT = "inject"
    IP_DRIFT = "ip-drift"
    FINISH_BOOT = "finish-boot"
    PROBE = "probe"
    RUNNING = "running"
    COMMITTED = "committed"
    UNDOING = "undoing"
    ROLLING_BACK = "rolling-back"
    ROLLED_BACK = "rolled-back"
    FAILED = "failed"


class Act(StrEnum):
    """One thing that is done to one side; the smallest unit with an intent and a result."""

    CHECK = "check"
    QUIESCE = "quiesce"
    SEAL = "seal"
    FENCE_SOURCE = "fence-source"
    SOURCE_GONE = "source-gone"
    CUT = "cut"
    GENERATION = "generation"
    DRAIN = "drain"
    INJECT = "inject"
    TAKE_ADDRESS = "take-address"
    FINISH_BOOT = "finish-boot"
    PROBE = "probe"
    REDEFINE = "redefine"
    UNFENCE = "unfence"
    THAW = "thaw"
    STOP_STANDBY = "stop-standby"
    GENERATION_BACK = "generation-back"
    RESTART_STANDBY = "restart-standby"


class Outcome(StrEnum):
    """``interrupted``: the controller died meanwhile; ``cancelled``: given up because another act failed;
    ``retried``: failed, but somebody asked to try again; ``unprepared``: the PE was restarted, what the act had done is
    gone, and the replicated system has surely not been started. These four may be begun again."""

    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"
    RETRIED = "retried"
    UNPREPARED = "unprepared"


PHASES = (
    State.CHECK,
    State.QUIESCE,
    State.SEAL,
    State.FENCE,
    State.DRAIN,
    State.INJECT,
    State.IP_DRIFT,
    State.FINISH_BOOT,
    State.PROBE,
)

PHASE_OF: dict[Act, State] = {
    Act.CHECK: State.CHECK,
    Act.QUIESCE: State.QUIESCE,
    Act.SEAL: State.SEAL,
    Act.FENCE_SOURCE: State.FENCE,
    Act.SOURCE_GONE: State.FENCE,
    Act.CUT: State.FENCE,
    Act.GENERATION: State.FENCE,
    Act.DRAIN: State.DRAIN,
    Act.INJECT: State.INJECT,
    Act.TAKE_ADDRESS: State.IP_DRIFT,
    Act.FINISH_BOOT: State.FINISH_BOOT,
    Act.PROBE: State.PROBE,
    Act.REDEFINE: State.PROBE,
    Act.UNFENCE: State.UNDOING,
    Act.THAW: State.UNDOING,
    Act.STOP_STANDBY: State.ROLLING_BACK,
    Act.GENERATION_BACK: State.ROLLING_BACK,
    Act.RESTART_STANDBY: State.ROLLING_BACK,
}
"""Unfence and thaw serve a rollback too; the timeline then counts them there."""

IN_PE = (Act.DRAIN, Act.INJECT, Act.TAKE_ADDRESS, Act.FINISH_BOOT, Act.PROBE, Act.REDEFINE)
"""What has to be done again when the PE was restarted between its injection and its kexec."""

TRANSITIONS: dict[State, frozenset[State]] = {
    State.CHECK: frozenset({State.QUIESCE, State.FENCE, State.FAILED}),
    State.QUIESCE: frozenset({State.SEAL, State.UNDOING, State.FAILED}),  # failed: cancelled before it began
    State.SEAL: frozenset({State.FENCE, State.UNDOING}),
    State.FENCE: frozenset({*PHASES[4:], State.UNDOING, State.ROLLING_BACK, State.FAILED}),
    State.DRAIN: frozenset({*PHASES[5:], State.ROLLING_BACK}),
    State.INJECT: frozenset({*PHASES[6:], State.ROLLING_BACK}),
    State.IP_DRIFT: frozenset({*PHASES[7:], State.ROLLING_BACK}),
    State.FINISH_BOOT: frozenset({State.DRAIN, State.PROBE, State.ROLLING_BACK}),  # drain: the PE was restarted
    State.PROBE: frozenset({State.DRAIN, State.RUNNING, State.ROLLING_BACK}),
    State.RUNNING: frozenset({State.COMMITTED, State.ROLLING_BACK}),
    State.UNDOING: frozenset({State.FAILED}),
    State.ROLLING_BACK: frozenset({State.ROLLED_BACK, State.FAILED}),  # failed: superseded by an unplanned one
    State.COMMITTED: frozenset(),
    State.ROLLED_BACK: frozenset(),
    State.FAILED: frozenset(),
}

TERMINAL = frozenset(state for state, following in TRANSITIONS.items() if not following)
AT_REST = TERMINAL | {State.RUNNING}
"""Nothing is being done in these states."""


def check_transition(old: State, new: State) -> None:
    """Raise ``IllegalTransition`` unless the table has the edge; staying is no transition."""
    if new != old and new not in TRANSITIONS[old]:
        raise IllegalTransition(
            f"A takeover cannot go from {old} to {new}.",
            remedy="This is a defect; please report it with the takeover's record.",
            old=old.value,
            new=new.value,
        )


class StandbyState(StrEnum):
    DEFINED = "defined"
    PE_BOOTING = "pe-booting"
    SEEDING = "seeding"
    FOLLOWING = "following"
    READY = "ready"
    TAKING_OVER = "taking-over"
    RUNNING = "running"
    COMMITTED = "committed"
    ROLLED_BACK = "rolled-back"
    FAILED = "failed"
    TEST = "test"


def standby_state(reported: str | None, takeover: State | None, stalled: bool = False) -> StandbyState:
    """What to show for a standby whose PE reports ``reported`` (None: it is silent), with its latest takeover's state.

    ``rolled-back`` is shown until the standby has started to follow again.
    """
    if takeover in (State.RUNNING, State.COMMITTED):
        return StandbyState(takeover.value)
    if takeover is not None and takeover not in TERMINAL:
        return StandbyState.FAILED if stalled else StandbyState.TAKING_OVER
    if reported is not None:
        return StandbyState(reported)
    return StandbyState.ROLLED_BACK if takeover is State.ROLLED_BACK else StandbyState.DEFINED
