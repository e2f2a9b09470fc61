"""The durable record of one takeover: the only memory of the controller.

Before an act is done its *intent* is stored (an entry without an outcome), afterwards its *result* (outcome, evidence
or error). Whoever starts with the stored record therefore knows what may have happened: everything with a result has,
everything with an intent only *may* have, nothing else has. All acts are idempotent, so the second kind is repeated.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import msgspec

from journal.position import Position
from standby.spec import MachineSpec
from standby.takeover.errors import RecordDamaged
from standby.takeover.states import (
    AT_REST,
    IN_PE,
    PHASE_OF,
    PHASES,
    Act,
    Direction,
    Mode,
    Outcome,
    State,
    check_transition,
)

RECORD_FORMAT = 1
ENTRIES_MAX = 1000
"""An upper bound of a record's timeline; far above what the attempt limit of the planner allows."""


class RecordStore(Protocol):
    """Where records live. ``save`` returns when the bytes are durable; a second save of an id replaces the first."""

    async def save(self, takeover: str, raw: bytes) -> None: ...

    async def load(self) -> dict[str, bytes]: ...


class Options(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """What the operator vouches for. ``source_is_down``: do not wait for the source's silence. ``force``: go on though
    the source reports, or somebody answers at the service address."""

    source_is_down: bool = False
    force: bool = False


class Entry(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One attempt at one act. Times are seconds since the Unix epoch; ``elapsed_s`` is by the monotonic clock."""

    act: Act
    phase: State
    attempt: int
    started_s: float
    ended_s: float | None = None
    elapsed_s: float | None = None
    outcome: Outcome | None = None
    evidence: dict[str, Any] = {}
    error: dict[str, Any] | None = None


class PhaseTime(msgspec.Struct, kw_only=True, frozen=True):
    """A phase of the timeline: from the first start of any of its acts to the last end."""

    phase: State
    started_s: float
    ended_s: float | None
    outcome: Outcome | None
    error: dict[str, Any] | None


class TakeoverRecord(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``cut`` is the position at which the source's history ends and ``generation`` starts. ``reason`` is the error
    that turned the direction; ``stalled`` the one that a person, or a peer that comes back, has to resolve."""

    format: int = RECORD_FORMAT
    id: str
    machine: str
    mode: Mode
    actor: str
    created_s: float
    spec: MachineSpec
    options: Options = Options()
    state: State = State.CHECK
    direction: Direction = Direction.FORWARD
    generation: int
    cut: str | None = None
    entries: list[Entry] = []
    rollback_requested: bool = False
    reason: dict[str, Any] | None = None
    stalled: dict[str, Any] | None = None
    running_s: float | None = None
    ended_s: float | None = None
    version: int = 0

    # --- reading --------------------------------------------------------------------------------------------------
    def last(self, act: Act) -> Entry | None:
        """The newest attempt at ``act``."""
        return next((entry for entry in reversed(self.entries) if entry.act == act), None)

    def begun(self, act: Act) -> bool:
        return self.last(act) is not None

    def done(self, act: Act) -> bool:
        return (entry := self.last(act)) is not None and entry.outcome is Outcome.DONE

    def failed(self, act: Act) -> bool:
        return (entry := self.last(act)) is not None and entry.outcome is Outcome.FAILED

    def pending(self, act: Act) -> bool:
        """An intent without a result."""
        return (entry := self.last(act)) is not None and entry.outcome is None

    def stands(self, act: Act) -> bool:
        """It was begun, and it is not known for sure that nothing of it is left. If that is the kexec, the standby's
        disks may hold what nobody else has: whatever boots on them, replay must not write there."""
        return (entry := self.last(act)) is not None and entry.outcome is not Outcome.UNPREPARED

    def unprepared_in_a_row(self, act: Act) -> int:
        """Attempts at ``act`` that found a restarted PE, since somebody last asked to try again."""
        count = 0
        for entry in reversed(self.entries):
            if entry.act is act and entry.outcome is Outcome.RETRIED:
                break
            count += entry.act is act and entry.outcome is Outcome.UNPREPARED
        return count

    @property
    def cut_position(self) -> Position | None:
        return None if self.cut is None else Position.parse(self.cut)

    @property
    def active(self) -> bool:
        """Something is still to be done, by us or by a person."""
        return self.state not in AT_REST

    @property
    def warnings(self) -> list[dict[str, Any]]:
        """Errors of acts that did not stop the takeover and have not been made good."""
        latest = {entry.act: entry for entry in self.entries}
        return [entry.error for entry in latest.values() if entry.outcome is Outcome.FAILED and entry.error]

    def timeline(self) -> list[PhaseTime]:
        """The phases in the order in which they began."""
        grouped: dict[State, list[Entry]] = {}
        for entry in self.entries:
            grouped.setdefault(entry.phase, []).append(entry)
        return [_phase_time(phase, entries) for phase, entries in grouped.items()]

    @property
    def phase_seconds(self) -> dict[str, float]:
        """Phase -> its wall time so far, for phases that have ended."""
        return {
            time.phase.value: max(0.0, time.ended_s - time.started_s)
            for time in self.timeline()
            if time.phase in PHASES and time.ended_s is not None
        }

    @property
    def downtime_s(self) -> float | None:
        """From the first act that takes the service away to the first answer of the probe; None until it is known.

        Unplanned: from the start of the takeover, for when the source died is the operator's knowledge.
        """
        probe, first = self.last(Act.PROBE), self.last(Act.QUIESCE) or self.last(Act.CHECK)
        if probe is None or probe.ended_s is None or probe.outcome is not Outcome.DONE or first is None:
            return None
        return probe.ended_s - next(entry.started_s for entry in self.entries if entry.act == first.act)

    # --- changing: every change goes through one of these -----------------------------------------------------------
    def move(self, state: State) -> None:
        """The one setter of ``state``."""
        check_transition(self.state, state)
        self.state = state

    def begin(self, act: Act, now_s: float) -> Entry:
        attempt = 1 + sum(entry.act == act for entry in self.entries)
        in_rollback = self.direction is Direction.ROLLBACK
        entry = Entry(
            act=act,
            phase=State.ROLLING_BACK if in_rollback else PHASE_OF[act],
            attempt=attempt,
            started_s=now_s,
        )
        self.entries.append(entry)
        return entry

    def reopen(self) -> None:
        """Nothing is stalled, and what has failed may be begun again."""
        self.stalled = None
        for entry in {entry.act: entry for entry in self.entries}.values():
            if entry.outcome is Outcome.FAILED:
                entry.outcome = Outcome.RETRIED

    def unprepare(self) -> None:
        """The PE was restarted and nothing was started: what was done in it is to be done again."""
        for act in IN_PE:
            if (entry := self.last(act)) is not None and entry.outcome is Outcome.DONE:
                entry.outcome = Outcome.UNPREPARED

    def encode(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, raw: bytes) -> TakeoverRecord:
        """Raises ``RecordDamaged``."""
        try:
            return _DECODER.decode(raw)
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise RecordDamaged(
                f"A stored takeover record cannot be read: {error}.",
                remedy="It was written by a newer version, or the store is damaged: upgrade, or restore a copy.",
            ) from error


_DECODER = msgspec.json.Decoder(TakeoverRecord)


def _phase_time(phase: State, entries: Iterable[Entry]) -> PhaseTime:
    entries = list(entries)
    latest = {entry.act: entry for entry in entries}.values()
    ended = [entry.ended_s for entry in latest]
    failures = [entry for entry in latest if entry.outcome is Outcome.FAILED]
    outcomes = {entry.outcome for entry in latest}
    if None in outcomes:
        outcome = None
    elif failures:
        outcome = Outcome.FAILED
    else:
        outcome = Outcome.DONE if outcomes == {Outcome.DONE} else next(iter(outcomes - {Outcome.DONE}))
    return PhaseTime(
        phase=phase,
        started_s=min(entry.started_s for entry in entries),
        ended_s=None if None in ended else max(moment for moment in ended if moment is not None),
        outcome=outcome,
        error=failures[-1].error if failures else None,
    )
