"""The replay engine: seed, catch up, follow, drain.

    starting ──► seeding ──► catching-up ──► following ◄──► draining ──► drained
        └── the cursor is good ──▲               ▲────────── resume() ──────┘

    seeding       the disks are made equal by comparing (``seed``); they are in no state the source ever had
    catching-up   after a seed everything is applied, also while the history is fuzzy, up to the first recovery point
                  that is not older than the end of the seed; after a restart, whole runs up to the newest recovery
                  point there was then, because the process before may have died inside of one
    following     only whole runs up to a recovery point are applied; while the history is fuzzy nothing is
    draining      as following, but up to one given position and no further
    drained       the disks are at exactly that position and stay there

Any error is shown in ``status().error`` and tried again with growing pauses: what is permanent for us (a disk that is
too small) may be changed by the operator without a restart. A history that changed under us, and a flush that failed,
lead back to seeding.

Invariants, checked by ``_check``:
1. the cursor is written after a flush, at a recovery point, and only while the disks are consistent;
2. a drained engine is consistent and its ``applied`` is the target of the drain;
3. a segment that was applied in part is applied whole before any other, or the disks are compared again;
4. while the disks are lent to somebody else (``lend``) nothing is applied and no cursor exists.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Coroutine, Mapping
from functools import partial
from typing import Any, Final

from journal.errors import CdpError, DrainNotYet
from journal.extent import Extents
from journal.position import Position
from journal.segment import Header
from journal.wire import FeedAnswer, FeedEntry
from standby.replay.ahead import Ahead
from standby.replay.apply import Applier
from standby.replay.cursor import resume_from
from standby.replay.ports import (
    Clock,
    Disk,
    DrainRefused,
    FlushFailed,
    HistoryChanged,
    Observer,
    Offload,
    T,
    Transport,
    Until,
)
from standby.replay.retry import pause_s, undamaged
from standby.replay.seed import Seeder
from standby.replay.states import TURNS, State, Status
from standby.replay.verify import verify_next

_POLL_S: Final = 20.0
"""How long the server may hold a feed request: bounds how late a dead connection is noticed."""
_SEEDS_AGAIN: Final = "The standby seeds again by itself, fetching only what differs."
_ACK_S: Final = 1.0
"""While catching up, flush and write the cursor this often: what a killed process applies again at most."""


class Follower:
    """``run`` is the one task that touches the disks; the other methods only tell it what to do."""

    def __init__(
        self,
        machine: uuid.UUID,
        transport: Transport,
        disks: Mapping[int, Disk],
        *,
        clock: Clock,
        offload: Offload,
        observer: Observer | None = None,
    ) -> None:
        self._machine = machine
        self._transport = transport
        self._clock = clock
        self._offload = offload
        self._observer = observer
        self._applier = Applier(disks)
        self._seeder: Seeder | None = None
        self._state: State = "starting"
        self._wake = asyncio.Event()
        self._applied: Position | None = None
        self._applied_header: Header | None = None
        self._consistent_from: Position | None = None
        self._consistent = False
        self._until: Until = "recovery-point"
        self._at_point = False
        self._torn: Position | None = None
        self._unacked: Position | None = None
        self._acked_s = 0.0
        self._backlog_bytes = 0
        self._error: CdpError | None = None
        self._target: Position | None = None
        self._drained: asyncio.Future[Position] | None = None
        self._lent = False

    # --- told from outside ----------------------------------------------------------------------------------------
    def status(self) -> Status:
        return Status(
            state=self._state,
            applied=self._applied,
            consistent=self._consistent,
            sealed_at_ns=self._applied_header.sealed_at_ns if self._applied_header else None,
            backlog_bytes=self._backlog_bytes,
            progress=self._seeder.progress if self._seeder else None,
            error=self._error,
        )

    async def drain(self, target: Position | None) -> Position:
        """Apply up to exactly ``target`` (None: the newest recovery point) and stop there. Idempotent.

        Raises ``DrainRefused`` if that cannot be done, ``DrainNotYet`` while the disks are still made equal; may be
        cancelled, the drain then goes on.
        """
        if target is None:
            newest = (await self._transport.state()).recovery_point
            if newest is None:
                raise _refused("The machine has no recovery point yet.")
            target = Position.parse(newest)
        if self._state == "drained" and target == self._applied:
            return target
        if self._lent:
            raise _refused("The disks were handed over already.")
        if self._consistent_from is None:
            self._wake.set()  # somebody waits: no pause before the next try
            raise _not_yet(f"The standby's disks are not consistent yet: it is {self._state}.", self._error)
        if target < self._consistent_from:
            raise _refused(f"The standby's disks are not consistent at {target.short}: it is {self._state}.")
        if self._applied is not None and target < self._applied:
            raise _refused(f"{self._applied.short} is applied already, which is later than {target.short}.")
        if self._drained is None or self._target != target:
            self._fail_drain(_refused("Another drain took its place."))
            self._target = target
            self._drained = asyncio.get_running_loop().create_future()
            # Nobody may be waiting when it fails, because the caller's deadline passed: that is no error.
            self._drained.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._wake.set()
        return await asyncio.shield(self._drained)

    async def lend(self) -> None:
        """Hand the drained disks over to somebody who writes to them; durable before this returns. Idempotent.

        Raises ``DrainNotYet`` if they are not: whoever was told that they are spoke to a process that has ended since.
        """
        if self._state != "drained":
            raise _not_yet(f"Only drained disks can be handed over; replay is {self._state}.")
        self._lent = True
        await self._transport.forget()
        self._check()

    def resume(self) -> None:
        """Follow again after a drain; seeds by comparing if the disks were lent. Idempotent."""
        self._fail_drain(_refused("The drain was given up."))
        self._target = self._drained = None
        if self._lent:
            self._lent = False
            self._lose()
        elif self._state in ("drained", "draining"):
            self._turn_to("following" if self._consistent else "catching-up")
        self._wake.set()

    # --- the task -------------------------------------------------------------------------------------------------
    async def run(self) -> None:
        """Until cancelled."""
        failures = 0
        while True:
            try:
                await self._step()
                failures = 0
                self._error = None
            except CdpError as error:
                failures += 1
                self._error = error
                if isinstance(error, HistoryChanged | FlushFailed):
                    self._lose()
                await self._unless_woken(self._clock.sleep(pause_s(failures)))
            self._check()

    async def _step(self) -> None:
        self._wake.clear()
        if self._state == "drained" and self._target in (None, self._applied):
            await self._wake.wait()
        elif self._applied is None:
            await self._start()
        else:
            await self._advance()

    async def _start(self) -> None:
        """From nothing to a position to continue from: the cursor's, or a seed's."""
        if self._state == "starting":
            state = await self._transport.state()
            self._applier.check_disks(state.disks)
            cursor = await resume_from(self._transport, self._applier.disks, self._offload, state)
            if cursor is not None:
                newest = Position.parse(state.recovery_point) if state.recovery_point else cursor
                self._settle(cursor, max(cursor, newest), "recovery-point")
                return
        self._turn_to("seeding")
        # First of all: a seed that breaks off leaves disks that no cursor may vouch for.
        await self._transport.forget()
        self._seeder = Seeder(self._machine, self._transport, self._applier, self._clock, self._offload)
        try:
            seeded = await self._seeder.run()
        finally:
            self._seeder = None
        self._settle(seeded.position, seeded.consistent_from, "tip")
        if seeded.idle:
            await self._at_recovery_point(due=True)

    def _settle(self, position: Position, consistent_from: Position, until: Until) -> None:
        self._applied, self._applied_header = position, None
        self._consistent_from, self._until = consistent_from, until
        self._turn_to("catching-up")
        if self._observer is not None:
            self._observer.everything_changed()
        self._at_point = until == "recovery-point" and position >= consistent_from
        if self._at_point:
            self._become_consistent()

    async def _advance(self) -> None:
        """Ask what follows and apply it."""
        assert self._applied is not None
        if self._target is not None:
            self._turn_to("draining")
            if self._target == self._applied:
                await self._finish_drain(self._target)
                return
        elif self._unacked is not None:
            await self._ack()
        answer = await self._unless_woken(self._transport.feed(self._applied, self._until, _POLL_S))
        if answer is None:
            return
        self._error = None
        if answer.restart:
            raise HistoryChanged(
                f"{self._applied.short} is not in the live history any more.",
                remedy=_SEEDS_AGAIN,
                applied=str(self._applied),
            )
        await self._apply_entries(self._wanted(answer))

    def _wanted(self, answer: FeedAnswer) -> list[FeedEntry]:
        """The entries up to the target of a drain; raises ``DrainRefused`` if the history passes by it."""
        if self._target is None:
            return answer.entries
        wanted: list[FeedEntry] = []
        for entry in answer.entries:
            position = Position.parse(entry.position)
            if position == self._target and entry.recovery_point:
                return [*wanted, entry]
            if position >= self._target:
                raise self._give_up_drain(self._target)
            wanted.append(entry)
        return wanted

    async def _apply_entries(self, entries: list[FeedEntry]) -> None:
        self._backlog_bytes = sum(entry.segment_bytes for entry in entries)
        until = self._until
        async with Ahead(self._transport, entries) as ahead:
            for number, entry in enumerate(entries):
                header = await undamaged(partial(self._apply_one, ahead, entry), self._clock)
                self._error = None
                self._backlog_bytes -= entry.segment_bytes
                if header.is_recovery_point:
                    await self._at_recovery_point(due=number == len(entries) - 1)
                # Consistent now, and the rest may end inside of a run; or a drain was asked for, maybe to the next one.
                if self._until != until or (self._target is not None and self._state != "draining"):
                    return

    async def _apply_one(self, ahead: Ahead, entry: FeedEntry) -> Header:
        assert self._applied is not None
        announced = Position.parse(entry.position)
        start = self._consistent_from
        # Until they are consistent, the disks may hold what a generation that branched off before it never had.
        branched = not self._consistent and start is not None and announced.generation != start.generation
        if branched or self._torn not in (None, announced):
            raise HistoryChanged(f"The disks may hold more than what {announced.short} follows.", remedy=_SEEDS_AGAIN)
        raw = await ahead.take(entry)
        verify = partial(verify_next, raw, self._machine, announced, self._applied)

        def work() -> tuple[Header, Extents]:
            segment = verify()
            # From its first byte on the disks are at no position until all of it is written.
            self._torn, self._at_point = announced, False
            self._applier.apply(segment)
            return segment.header, segment.extents

        header, extents = await self._offload(work)
        self._applied, self._applied_header, self._torn = header.position, header, None
        if self._observer is not None:
            self._observer.applied(extents)
        return header

    async def _at_recovery_point(self, *, due: bool) -> None:
        """``applied`` is a recovery point; ``due``: the last of its batch."""
        assert self._applied is not None and self._consistent_from is not None
        if self._applied < self._consistent_from:
            return
        self._at_point = True
        self._unacked = self._applied
        if not self._consistent:
            self._become_consistent()
            due = True
        if self._target is not None:
            return
        if due or self._clock.monotonic() - self._acked_s >= _ACK_S:
            await self._ack()
            if due and self._observer is not None:
                await self._observer.recovery_point(self._applied)

    def _become_consistent(self) -> None:
        self._consistent, self._until = True, "recovery-point"
        if self._state == "catching-up":
            self._turn_to("following")

    async def _ack(self) -> None:
        """Data first, cursor last."""
        assert self._unacked is not None and self._consistent and not self._lent
        await self._offload(self._applier.flush)
        await self._transport.ack(self._unacked)
        self._unacked = None
        self._acked_s = self._clock.monotonic()

    def _give_up_drain(self, target: Position) -> CdpError:
        refused = _refused(f"{target.short} is not a recovery point of the live history.")
        self._fail_drain(refused)
        self.resume()
        return refused

    async def _finish_drain(self, target: Position) -> None:
        if not self._at_point:
            raise self._give_up_drain(target)
        # The cursor is not written here: the takeover waits, and will remove it anyway.
        await self._offload(self._applier.flush)
        if self._target != target:
            return  # resumed, or another target, meanwhile
        self._turn_to("drained")
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(target)

    def _lose(self) -> None:
        """The disks are in no known state any more."""
        self._fail_drain(_not_yet("The disks are in no known state any more; the standby compares them again."))
        self._target = self._drained = None
        self._applied = self._applied_header = self._consistent_from = self._unacked = self._torn = None
        self._consistent = self._at_point = False
        self._until, self._backlog_bytes = "recovery-point", 0
        self._turn_to("seeding")

    def _fail_drain(self, error: CdpError) -> None:
        if self._drained is not None and not self._drained.done():
            self._drained.set_exception(error)

    async def _unless_woken(self, work: Coroutine[Any, Any, T]) -> T | None:
        """The result of ``work``, or None, with ``work`` cancelled, as soon as somebody tells us something."""
        if self._wake.is_set():
            work.close()
            return None
        working = asyncio.ensure_future(work)
        waking = asyncio.ensure_future(self._wake.wait())
        try:
            await asyncio.wait({working, waking}, return_when=asyncio.FIRST_COMPLETED)
            return working.result() if working.done() else None
        finally:
            await _end(working, waking)

    def _turn_to(self, state: State) -> None:
        if state != self._state:
            assert state in TURNS[self._state], (self._state, state)
            self._state = state

    def _check(self) -> None:
        assert self._consistent or self._unacked is None
        drained = self._state == "drained"
        assert not drained or (self._consistent and self._at_point and self._applied is not None)
        assert drained or not self._lent


async def _end(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _refused(sentence: str) -> DrainRefused:
    return DrainRefused(sentence, remedy="See 'cdp status' for where the standby is; try again once it is following.")


def _not_yet(sentence: str, because: CdpError | None = None) -> DrainNotYet:
    remedy = "It goes on by itself; try again, and see 'cdp status' for how far it is."
    return DrainNotYet(sentence if because is None else f"{sentence} {because.sentence}", remedy=remedy)
