"""One takeover being driven: the loop between the planner and the acts.

next_step ─► Start ─► intents stored ─► acts run, each with its deadline ─► result stored ─► next_step
          ─► Cancel, Turn ─► stored ─► next_step
          ─► Settle, Stall ─► stored, the loop ends
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from journal.errors import CdpError
from standby.takeover.acts import Acts, describe
from standby.takeover.errors import PhaseDeadline, Unprepared
from standby.takeover.plan import (
    Cancel,
    Observed,
    Settle,
    Stall,
    Start,
    Turn,
    Wait,
    check_invariants,
    has_work,
    needs_bumped,
    next_step,
    state_of,
)
from standby.takeover.ports import Ports
from standby.takeover.record import Entry, TakeoverRecord
from standby.takeover.states import Act, Direction, Outcome, State

log = logging.getLogger(__name__)

BACKOFF_S, BACKOFF_S_MAX = 0.1, 2.0
"""Between repetitions of an act that failed in a way that may pass. Short at first: this is downtime."""
UNPREPARED_MAX = 4
"""Restarts of the PE between injection and kexec that are followed by another try; more are no accident."""
REPEATS_MAX = 1000
"""Bounds the acts without a deadline; the others end by theirs long before."""


@dataclass(frozen=True, slots=True)
class _Result:
    act: Act
    entry: Entry
    outcome: Outcome
    evidence: dict[str, Any]
    error: dict[str, Any] | None
    elapsed_s: float


class Drive:
    """``run`` until the takeover is at rest or stalls; ``poke`` after the record was changed by somebody else."""

    def __init__(self, record: TakeoverRecord, ports: Ports, save: Callable[[TakeoverRecord], Awaitable[None]]) -> None:
        self.finished = False
        """Set in the same instant in which the last look at the record was taken."""
        self._record = record
        self._ports = ports
        self._save = save
        self._acts = Acts(record, ports, self._store)
        self._running: dict[Act, asyncio.Task[None]] = {}
        self._news: asyncio.Queue[_Result | None] = asyncio.Queue()

    def poke(self) -> None:
        self._news.put_nowait(None)

    async def run(self) -> None:
        now_s = self._ports.clock.now_s()
        for entry in self._record.entries:
            if entry.outcome is None:
                entry.outcome, entry.ended_s = Outcome.INTERRUPTED, now_s
        async with asyncio.TaskGroup() as group:
            while await self._one_step(group):
                pass

    async def _one_step(self, group: asyncio.TaskGroup) -> bool:
        """False when there is nothing more to do."""
        record = self._record
        now_s = self._ports.clock.now_s()
        bumped = await self._bumped() if needs_bumped(record, now_s) else None
        match next_step(Observed(record, self._ports.clock.now_s(), bumped)):
            case Start(acts):
                started = [(act, record.begin(act, self._ports.clock.now_s())) for act in acts]
                await self._store()
                for act, entry in started:
                    self._running[act] = group.create_task(self._run_act(act, entry), name=f"{record.id} {act}")
            case Wait():
                if (result := await self._news.get()) is not None:
                    self._take(result)
                    await self._store()
            case Cancel(acts):
                await self._cancel(acts)
            case Turn(direction, reason):
                record.direction, record.reason = direction, reason
                log.warning("takeover %s: %s, because: %s", record.id, direction, reason.get("sentence"))
                await self._store()
            case Settle(state, reason):
                self._settle(state, reason)
                await self._store()
                self.finished = not has_work(record)
            case Stall(reason):
                record.stalled = reason
                log.error("takeover %s stalled: %s %s", record.id, reason.get("sentence"), reason.get("remedy"))
                await self._store()
                self.finished = record.stalled is not None
        return not self.finished

    # --- the record -------------------------------------------------------------------------------------------------
    async def _store(self) -> None:
        record = self._record
        # A takeover that runs leaves that state by turning back only.
        if record.active or (record.state is State.RUNNING and record.direction is Direction.ROLLBACK):
            state = state_of(record)
            if state is not record.state:
                log.info("takeover %s: %s", record.id, state)
            record.move(state)
        check_invariants(record)
        await self._save(record)

    def _settle(self, state: State, reason: dict[str, Any] | None) -> None:
        record = self._record
        record.move(state)
        record.reason = reason or record.reason
        if state is State.RUNNING:
            record.running_s = record.running_s or self._ports.clock.now_s()
        else:
            record.ended_s = self._ports.clock.now_s()
        log.info("takeover %s: %s", record.id, state)

    def _take(self, result: _Result) -> None:
        """Write a result into the record, with what follows from it."""
        record, entry = self._record, result.entry
        self._running.pop(result.act, None)
        entry.outcome, entry.error = result.outcome, result.error
        entry.evidence = result.evidence or entry.evidence
        entry.ended_s = self._ports.clock.now_s()
        entry.elapsed_s = round(result.elapsed_s, 6)
        if result.outcome is Outcome.UNPREPARED:
            record.unprepare()
        if result.act is Act.CUT and result.outcome is Outcome.DONE:
            record.cut = str(result.evidence["position"])

    async def _bumped(self) -> bool | None:
        """Is the next generation live? None if the store does not say."""
        cut = self._record.cut_position
        if cut is None:
            return False
        try:
            return await self._ports.store.started(self._record.machine, self._record.generation, cut)
        except (CdpError, OSError):
            return None

    # --- acts -------------------------------------------------------------------------------------------------------
    async def _cancel(self, acts: tuple[Act, ...]) -> None:
        tasks = [task for act in acts if (task := self._running.pop(act, None)) is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        now_s = self._ports.clock.now_s()
        for act in acts:
            entry = self._record.last(act)
            if entry is not None and entry.outcome is None:
                entry.outcome, entry.ended_s = Outcome.CANCELLED, now_s
        await self._store()

    async def _run_act(self, act: Act, entry: Entry) -> None:
        start = self._ports.clock.monotonic_s()
        outcome, evidence, error = Outcome.DONE, {}, None
        try:
            evidence = await self._attempt(act)
        except Exception as problem:
            # Whatever it is, a defect included, the record has to say so and the source must be given back.
            again = isinstance(problem, Unprepared) and self._record.unprepared_in_a_row(act) < UNPREPARED_MAX
            if not isinstance(problem, CdpError | OSError):
                log.exception("takeover %s: %s failed unexpectedly", self._record.id, act)
            outcome, error = Outcome.UNPREPARED if again else Outcome.FAILED, describe(problem)
        elapsed_s = self._ports.clock.monotonic_s() - start
        self._news.put_nowait(_Result(act, entry, outcome, evidence, error, elapsed_s))

    async def _attempt(self, act: Act) -> dict[str, Any]:
        """Do the act, again and again while its errors may pass, until its deadline."""
        deadline_s = self._acts.deadline_s(act)
        problem: Exception | None = None
        try:
            async with asyncio.timeout(deadline_s):
                pause_s = BACKOFF_S
                for _ in range(REPEATS_MAX):
                    try:
                        return await self._acts.do(act)
                    except (CdpError, OSError) as error:
                        if isinstance(error, CdpError) and not error.transient:
                            raise
                        problem = error
                    await self._ports.clock.sleep(pause_s)
                    pause_s = min(pause_s * 2, BACKOFF_S_MAX)
        except TimeoutError:
            pass
        entry = self._record.last(act)
        last = describe(problem) if problem is not None else None
        waiting = entry.evidence.get("waiting_for") if entry is not None else None
        raise PhaseDeadline(
            f"{act} was not done within {deadline_s or 0:.0f} s: "
            + (last["sentence"] if last else waiting or "no answer came")
            + ("" if last and str(last["sentence"]).endswith(".") else "."),
            remedy=(str(last["remedy"]) if last else "")
            or "See that side's log; the deadlines are in the specification.",
            act=act.value,
            last=last,
        ) from problem
