"""What to do next, as a pure function of what is known. The controller acts; this decides.

Three graphs say which act needs which others to be done. Whatever has its needs met starts at once, so independent acts
overlap:

    planned     check ─ quiesce ─ seal ─ fence-source ─┐
    unplanned   check ─ source-gone ───────────────────┴─ cut ─ generation ─┬─ drain ─ inject ─┬─ finish-boot ─┐
                                                                            └─ take-address ───┘               │
                                                                                            probe, redefine ───┘
    undo        unfence ─ thaw                                 (each only if its counterpart has begun)
    rollback    stop-standby ─ generation-back ─┬─ unfence ─ thaw
                                                └─ restart-standby

The cut is the last recovery point after the source was fenced, not the one that was sealed: the source may have sealed
once more (it does so when its writers can only be stopped by taking the address away), and the standby, which follows
all the time, may have applied that already. For the same reason the drain costs next to nothing where it stands.

Invariants, checked by ``check_invariants`` after every change of a record:

1. The standby takes the address only after the source has verifiably given it up, or is gone, *and* the next generation
   is live.
2. The source gets the address back only if the standby has never begun to take it (undo), or has verifiably been
   stopped and the generation after it is live (rollback).
3. Nothing is undone once the next generation may be live; nothing is rolled back before.
4. The standby's disk is written (inject) only after it has applied exactly the cut, and the cut is final.
5. The cut never changes once the generation on top of it has been begun.
6. An undo or a rollback belongs to a planned takeover: an unplanned one has no source to return to.
7. A record at rest has no intent without a result, but for acts that the service does not need.
8. The disks are drained and changed (again) only while the replicated system has surely not been started from them.

A PE that was restarted between its injection and its kexec has forgotten what it had prepared. If it is certain that
the replicated system was not started meanwhile (``injection``), all that was done in the PE becomes *unprepared*, and
the same graph leads through drain and injection once more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from standby.spec import MachineSpec
from standby.takeover.errors import InvariantBroken, LeaseExpired, TakeoverRefused
from standby.takeover.record import ENTRIES_MAX, TakeoverRecord
from standby.takeover.states import AT_REST, PHASE_OF, PHASES, Act, Direction, Mode, Outcome, State

Graph = Mapping[Act, frozenset[Act]]

ATTEMPTS_MAX = 8
"""Attempts at one act in one direction that ended without the controller's doing (interrupted); then it has failed."""
LEASE_MARGIN_S = 5.0
"""Beyond the deadlines of quiesce, seal and fence: for what the controller does between them."""


def _graph(**needs: str) -> Graph:
    return {
        Act(act.replace("_", "-")): frozenset(Act(need.replace("_", "-")) for need in text.split())
        for act, text in needs.items()
    }


_TAIL = {
    "generation": "cut",
    "drain": "generation",
    "inject": "drain",
    "take_address": "generation",
    "finish_boot": "inject take_address",
    "probe": "finish_boot",
    "redefine": "finish_boot",
}
PLANNED = _graph(check="", quiesce="check", seal="quiesce", fence_source="seal", cut="fence_source", **_TAIL)
UNPLANNED = _graph(check="", source_gone="check", cut="source_gone", **_TAIL)
UNDO = _graph(unfence="", thaw="unfence")
ROLLBACK = _graph(
    stop_standby="",
    generation_back="stop_standby",
    unfence="generation_back",
    thaw="unfence",
    restart_standby="generation_back",
)

UNDOES = {Act.UNFENCE: Act.FENCE_SOURCE, Act.THAW: Act.QUIESCE}
OPTIONAL = frozenset({Act.REDEFINE, Act.RESTART_STANDBY})
"""Their failure is shown but turns nothing around: the service is up without them."""
NEVER_CANCELLED = frozenset({Act.CUT, Act.GENERATION, Act.GENERATION_BACK})
"""Short transactions of our own store, whose outcome has to be known."""


@dataclass(frozen=True, slots=True)
class Observed:
    """``bumped``: is the generation of this takeover in the store's history? Needed only where ``needs_bumped``."""

    record: TakeoverRecord
    now_s: float
    bumped: bool | None = None


@dataclass(frozen=True, slots=True)
class Start:
    """Persist these intents, then do them, all at once."""

    acts: tuple[Act, ...]


@dataclass(frozen=True, slots=True)
class Wait:
    """For the next result."""


@dataclass(frozen=True, slots=True)
class Cancel:
    """Give these acts up; their effects are unknown."""

    acts: tuple[Act, ...]


@dataclass(frozen=True, slots=True)
class Turn:
    """Go on in another direction, because of ``reason``."""

    direction: Direction
    reason: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Settle:
    """The takeover comes to rest."""

    state: State
    reason: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Stall:
    """Nothing more can be done until a person retries or a peer comes back."""

    reason: dict[str, Any]


_END = {
    Direction.FORWARD: State.RUNNING,
    Direction.UNDO: State.FAILED,
    Direction.ROLLBACK: State.ROLLED_BACK,
}

Step = Start | Wait | Cancel | Turn | Settle | Stall


def graph_of(record: TakeoverRecord) -> Graph:
    """The acts of the record's direction."""
    if record.direction is Direction.ROLLBACK:
        return ROLLBACK
    if record.direction is Direction.UNDO:
        wanted = {undo for undo, act in UNDOES.items() if record.begun(act)}
        return {act: needs & wanted for act, needs in UNDO.items() if act in wanted}
    return PLANNED if record.mode is Mode.PLANNED else UNPLANNED


def lease_s(spec: MachineSpec) -> float:
    """For how long the source stays quiesced by itself; it thaws afterwards unless it has been fenced."""
    deadlines = spec.deadlines
    return deadlines.quiesce + deadlines.seal + deadlines.fence + LEASE_MARGIN_S


def needs_bumped(record: TakeoverRecord, now_s: float) -> bool:
    """Does the next decision depend on whether the next generation is live?"""
    return record.direction is Direction.FORWARD and _trouble(record, now_s) is not None


def next_step(observed: Observed) -> Step:
    """The next step. Total: every record that the invariants allow has one."""
    record = observed.record
    graph = graph_of(record)
    pending = tuple(act for act in graph if record.pending(act))
    trouble = _trouble(record, observed.now_s)
    if record.direction is Direction.FORWARD and trouble is not None:
        return _turn(observed, trouble, pending)
    ready = tuple(act for act in graph if _startable(record, act) and all(record.done(need) for need in graph[act]))
    if ready and trouble is None:
        return Start(ready)
    if pending:
        return Wait()
    return Stall(trouble) if trouble is not None else Settle(_END[record.direction], record.reason)


def state_of(record: TakeoverRecord) -> State:
    """The state that a record which is not at rest must show: the first phase that has not ended."""
    if record.direction is Direction.UNDO:
        return State.UNDOING
    if record.direction is Direction.ROLLBACK:
        return State.ROLLING_BACK
    graph = graph_of(record)
    open_phases = {PHASE_OF[act] for act in graph if not record.done(act) and act not in OPTIONAL}
    return next((phase for phase in PHASES if phase in open_phases), State.PROBE)


def has_work(record: TakeoverRecord) -> bool:
    """Will the drive do something with this record? One that runs may have to turn back, or to redefine its domain."""
    if record.state is not State.RUNNING:
        return record.active
    redefine = record.last(Act.REDEFINE)
    mended = redefine is None or redefine.outcome in (Outcome.DONE, Outcome.FAILED)
    return record.rollback_requested or not mended


def check_command(record: TakeoverRecord, command: str, now_s: float) -> None:
    """May the operator ``commit``, ``rollback`` or ``retry`` this takeover now? Raises ``TakeoverRefused``."""
    if command == "commit":
        if record.state is State.RUNNING and not has_work(record):
            return
        why, remedy = f"it is {record.state}, not running", "Wait until it runs ('cdp status')."
    elif command == "retry":
        if record.stalled is not None or (record.state is State.RUNNING and record.failed(Act.REDEFINE)):
            return
        why, remedy = "it is not stalled", "See 'cdp takeovers' for what it is doing."
    elif record.mode is Mode.UNPLANNED:
        why, remedy = "it was unplanned", "Protect the taken-over machine and fail back to the old source instead."
    elif record.state is State.RUNNING and now_s > (record.running_s or 0.0) + record.spec.rollback_window_s:
        why, remedy = "its rollback window has passed", "Commit it, and fail back to the old source instead."
    elif record.state in AT_REST - {State.RUNNING}:
        why, remedy = f"it is {record.state}", "There is nothing to roll back."
    elif record.direction is not Direction.FORWARD:
        why, remedy = "it is on its way back already", "See 'cdp takeovers' for how far it is."
    else:
        return
    raise TakeoverRefused(
        f"Takeover {record.id} cannot {command}: {why}.", remedy=remedy, takeover=record.id, state=record.state.value
    )


def check_invariants(record: TakeoverRecord) -> None:
    """Raise ``InvariantBroken`` if the record is one that must not exist. The numbers are those of the header."""
    begun, done = record.begun, record.done
    gone = Act.FENCE_SOURCE if record.mode is Mode.PLANNED else Act.SOURCE_GONE
    back = begun(Act.UNFENCE) or begun(Act.THAW)
    undo, rollback = record.direction is Direction.UNDO, record.direction is Direction.ROLLBACK
    broken = {
        1: begun(Act.TAKE_ADDRESS) and not (done(gone) and done(Act.GENERATION)),
        2: back
        and not (undo and not begun(Act.TAKE_ADDRESS))
        and not (rollback and done(Act.STOP_STANDBY) and done(Act.GENERATION_BACK)),
        3: (undo and done(Act.GENERATION)) or (rollback and not begun(Act.GENERATION)),
        4: record.stands(Act.INJECT) and not (done(Act.DRAIN) and done(Act.GENERATION)),
        5: begun(Act.GENERATION) and record.cut is None,
        6: (undo or rollback) and record.mode is Mode.UNPLANNED,
        7: record.state in AT_REST and any(record.pending(act) for act in Act if act not in OPTIONAL),
        8: record.stands(Act.FINISH_BOOT) and (record.pending(Act.DRAIN) or record.pending(Act.INJECT)),
    }
    wrong = [number for number, is_broken in broken.items() if is_broken]
    if wrong or len(record.entries) > ENTRIES_MAX:
        raise InvariantBroken(
            f"Takeover {record.id} breaks invariants {wrong} of the plan.",
            remedy="This is a defect; please report it with the takeover's record.",
            takeover=record.id,
            broken=wrong,
        )


def _startable(record: TakeoverRecord, act: Act) -> bool:
    entry = record.last(act)
    if entry is None:
        return True
    return entry.outcome in (Outcome.INTERRUPTED, Outcome.CANCELLED, Outcome.RETRIED, Outcome.UNPREPARED)


def _trouble(record: TakeoverRecord, now_s: float) -> dict[str, Any] | None:
    """The reason why the present direction cannot be followed to its end, if there is one."""
    graph = graph_of(record)
    for act in graph:
        entry = record.last(act)
        if entry is not None and entry.outcome is Outcome.FAILED and act not in OPTIONAL:
            return entry.error or {"code": "unknown"}
        if sum(one.outcome is Outcome.INTERRUPTED for one in record.entries if one.act == act) >= ATTEMPTS_MAX:
            return TakeoverRefused(
                f"The act {act} was interrupted {ATTEMPTS_MAX} times.",
                remedy="Find out why the server keeps restarting.",
                act=act.value,
            ).as_dict()
    if record.direction is not Direction.FORWARD:
        return None
    if record.rollback_requested:
        return TakeoverRefused("The operator asked to go back.", takeover=record.id).as_dict()
    return _lease_trouble(record, now_s)


def _lease_trouble(record: TakeoverRecord, now_s: float) -> dict[str, Any] | None:
    """Between its quiesce and its fence the source may thaw itself, if we take too long."""
    quiesced = next((entry for entry in record.entries if entry.act is Act.QUIESCE), None)
    if quiesced is None or record.begun(Act.GENERATION):
        return None
    fenced = record.last(Act.FENCE_SOURCE)
    moment = fenced.ended_s if fenced is not None and fenced.outcome is Outcome.DONE else now_s
    if (moment or now_s) <= quiesced.started_s + lease_s(record.spec):
        return None
    return LeaseExpired(
        "The source was not fenced while it was certainly quiesced.",
        remedy="Start the takeover again; if the server was down meanwhile, nothing else is wrong.",
        lease_s=lease_s(record.spec),
    ).as_dict()


def _turn(observed: Observed, trouble: dict[str, Any], pending: tuple[Act, ...]) -> Step:
    """Which way out, after a forward act has failed."""
    record = observed.record
    if pending:
        cancel = tuple(act for act in pending if act not in NEVER_CANCELLED)
        return Cancel(cancel) if cancel else Wait()
    bumped = record.done(Act.GENERATION) or observed.bumped
    if record.mode is Mode.UNPLANNED:
        return Settle(State.FAILED, trouble) if bumped is False else Stall(trouble)
    if bumped and (record.spec.automatic_rollback or record.rollback_requested):
        return Turn(Direction.ROLLBACK, trouble)
    if bumped is not False:
        return Stall(trouble)
    changed = any(record.begun(act) for act in UNDOES.values())
    return Turn(Direction.UNDO, trouble) if changed else Settle(State.FAILED, trouble)
