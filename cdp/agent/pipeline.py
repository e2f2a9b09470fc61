"""Raw spool -> sealed segments, once a second: the agent's heart beat.

    wait for the second's end (or: copy, while a round reads)
      └► cut: mark ─► drop generation ─► windows sealed, cursor with each ─► rounds move on ─► push is told

Modes. *Sealing* is the normal one. *Dropping* consumes the raw spool too, but marks what it held as dirty instead of
sealing it: while the spool is full, while this machine is fenced, and before there is a history. *Held* consumes
nothing for a short while: between the seal of a planned takeover and its fence nothing may be added to the history.

Invariants: the cursor never passes what is sealed or marked; a segment is a recovery point only if nothing is dirty and
the drop generation, read after draining to its cut, is the one that was dealt with. Every doubt makes it fuzzy.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Final, Literal

import msgspec

from cdp.agent import history
from cdp.agent.capture.session import CaptureSession, Losses
from cdp.agent.capture.spool import Mark, RawSpool
from cdp.agent.copy import BUFFER_BYTES
from cdp.agent.dirty import Geometry
from cdp.agent.errors import Fenced, no_recovery_point
from cdp.agent.pace import Pace
from cdp.agent.rounds import Rounds
from cdp.agent.seal import WINDOW_BYTES, Cut, Sealer
from cdp.agent.sealorders import SealOrders
from cdp.agent.spool import Spool, Spooled
from cdp.agent.state import Cursor
from cdp.agent.status import Status
from journal.errors import CdpError
from journal.position import Position
from journal.segment import Flags
from journal.wire import MachineState

log = logging.getLogger(__name__)

Dropping = Literal["no-history", "spool-full", "fenced"]
MARK_DEADLINE_S: Final = 1.0
"""Without a mark for this long the raw spool is full or the drainer is dead: seal what is there."""
HURRY_BYTES: Final = 4 * WINDOW_BYTES
"""So far behind, speed counts more than the ratio of the compression."""
SEGMENT_ROOM_BYTES: Final = WINDOW_BYTES + BUFFER_BYTES + (1 << 20)
"""An encoded segment is never larger."""
RESUME_FRACTION: Final = 0.5
"""Dropping ends when the spool is this empty, so that it does not end and begin with every segment."""


class Pipeline:
    """One history at a time. All public methods belong to the event loop; compression and disks to ``worker``."""

    def __init__(
        self,
        machine: uuid.UUID,
        disks: list[Geometry],
        *,
        session: CaptureSession,
        raw: RawSpool,
        spool: Spool,
        rounds: Rounds,
        status: Status,
        worker: Executor,
        segment_s: float,
        sealed: Callable[[], None],
    ) -> None:
        self._machine = machine
        self._disks = disks
        self._session = session
        self._raw = raw
        self._spool = spool
        self._rounds = rounds
        self.comparison = rounds.comparison
        self._status = status
        self._worker = worker
        self._segment_s = segment_s
        self._sealed = sealed
        self._sealer = Sealer(machine, spool, raw)
        self._key = (str(machine), status.boot_id, f"{session.capture_id:016x}")
        self._cursor: Cursor | None = None
        self._dropping: Dropping | None = "no-history"
        self._lost_generation = -1
        self._orders = SealOrders()
        self._pace = Pace(raw.drained)
        self._lock = asyncio.Lock()
        self._wake = asyncio.Event()
        self._disks_changed: dict[int, str] = {}
        self._copy_pause_until = 0.0

    @property
    def tip(self) -> Position | None:
        """The last sealed position; None before there is a history."""
        return None if self._cursor is None else self._cursor.position

    # --- history ------------------------------------------------------------------------------------------------------
    def adopt(self) -> bool:
        """Go on where an earlier process stopped; False if there is nothing to go on with. Before ``run``."""
        cursor = self._spool.open()
        if cursor is None or not history.may_continue(cursor, self._key, self._disks):
            self._spool.discard()
            return False
        rounds = self._rounds
        rounds.dealt = cursor.dealt
        rounds.dirty.unpack(cursor.dirty)
        for index in history.new_disks(cursor, self._disks):
            rounds.dirty.mark_all(index)
        self._cursor = msgspec.structs.replace(cursor, disks=self._disks)
        if cursor.round is not None:
            rounds.begin(cursor.round)
        self._dropping = None
        self._show(fuzzy=not rounds.clean(self._session.losses().generation))
        log.info("continuing at %s", cursor.position.short)
        return True

    async def begin(self, state: MachineState, reason: str) -> None:
        """Begin at the server's tip with nothing known of the disks: a seed, or a comparison. ``state`` is settled
        (``dedup.settled_state``)."""
        history.check_disks(self._disks, state.disks)
        async with self._lock:
            self._begin(Position.parse(state.tip), reason, prefilled=state.prefill != "none")

    async def lift(self, tip: Position) -> None:
        """The fence is lifted: go on in the generation of ``tip``, with as little copying as is safe."""
        async with self._lock:
            ours = self._cursor
            if ours is None or not history.stands_on(self._machine, tip, ours.position):
                self._begin(tip, "unfenced")
                return
            self._spool.acknowledged(ours.position)
            self._cursor = msgspec.structs.replace(ours, tip=str(tip))
            self._spool.commit(self._cursor)
            self._status.sealed = self._status.stored = tip
            self._dropping = None
            self._wake.set()

    def _begin(self, tip: Position, reason: str, *, prefilled: bool = True) -> None:
        self._spool.discard()
        # The drop generation is read first: whatever is lost from here on is the next round's.
        generation = self._session.losses().generation
        start = self._raw.drained
        rounds = self._rounds
        rounds.dirty.clear()
        rounds.dealt = generation
        current = history.first_round(self._machine, tip, generation, reason, self._disks, prefilled=prefilled)
        self._cursor = history.first_cursor(self._key, self._disks, tip, start, current)
        self._spool.commit(self._cursor)
        self._raw.release(start)
        rounds.begin(current)
        self._dropping = None
        self._status.starting = False
        self._status.sealed = self._status.stored = tip
        self._show(fuzzy=True)
        self._status.resyncs[current.reason] += 1
        self._wake.set()
        log.info("history begins at %s: %s (%s)", tip.short, current.kind, current.reason)

    # --- orders -------------------------------------------------------------------------------------------------------
    async def seal_now(self, *, hold: bool) -> Position:
        """Cut now; the sealed recovery point. ``hold``: add nothing to the history until ``release`` or a fence.
        Raises ``NoRecoveryPoint`` or ``Fenced``. May be cancelled: the cut itself is the beat's business."""
        order = self._orders.ask(hold=hold)
        self._wake.set()
        return await order

    def release(self) -> None:
        """End a hold."""
        self._orders.release()
        self._wake.set()

    async def fence(self) -> None:
        """Seal nothing more; what is captured from here on is marked, for a resync if the fence is lifted."""
        async with self._lock:
            self._drop("fenced")
            self._orders.release()

    async def compare(self, reason: str) -> None:
        """Compare everything with the server, in the history as it is."""
        async with self._lock:
            if self._cursor is None or self._dropping is not None:
                return  # there is nothing to compare with, or a comparison follows anyway
            rounds = self._rounds
            generation = self._session.losses().generation
            current = history.first_round(self._machine, self._cursor.position, generation, reason, self._disks)
            # Even right after a genesis this must not leave zeros out: something may have been sealed on top of it.
            current.kind, current.reason = "compare", reason
            rounds.dirty.clear()
            rounds.begin(current)
            self._cursor = msgspec.structs.replace(self._cursor, round=current, dirty={})
            self._spool.commit(self._cursor)
            self._status.resyncs[reason] += 1
            self._wake.set()

    async def copy_again(self, ranges: list[tuple[int, int, int]]) -> None:
        """Send these ``(disk, offset, length)`` ranges anew, whatever they hold: the server has lost them."""
        async with self._lock:
            self._rounds.mark(ranges)
            if self._cursor is not None:
                self._cursor = msgspec.structs.replace(self._cursor, dirty=self._rounds.dirty.pack())
                self._spool.commit(self._cursor)
            self._wake.set()

    # --- the beat -----------------------------------------------------------------------------------------------------
    async def run(self) -> None:
        """Until cancelled. The first cut is made at once: there may be much to catch up with."""
        due = time.monotonic()
        while True:
            await self._wait(due)
            early = time.monotonic() < due and not self._orders and not self._rounds.urgent
            async with self._lock:
                if self._orders.held and self._cursor is not None:
                    self._orders.grant(len(self._orders), self._cursor.position)  # the same order again
                elif early and self._dropping is None and self._behind >= WINDOW_BYTES:
                    await self._seal_ahead()
                    continue
                else:
                    await self._copy(due)
                    # Whoever asks during the cut is answered by the next one: this one's mark is older than the order.
                    asked = len(self._orders)
                    self._obey(await self._cut(), asked)
            now = time.monotonic()
            if now >= due:
                due += self._segment_s * (1 + (now - due) // self._segment_s)

    def _obey(self, entry: Spooled | None, asked: int) -> None:
        """Answer the first ``asked`` orders to seal, given the segment that has been sealed up to a mark since."""
        if self._dropping == "fenced":
            self._orders.refuse(
                asked, lambda: Fenced("This machine is fenced; it seals nothing.", remedy="See 'cdp status'.")
            )
        elif entry is None and self._dropping is None:
            return  # the cut has only caught up with a raw spool that was full; the next one is it
        elif entry is None or not entry.recovery_point:
            self._orders.refuse(asked, lambda: no_recovery_point(self._status.fuzzy_reason))
        else:
            self._orders.grant(asked, entry.position)

    @property
    def _may_copy(self) -> bool:
        """A copy gives way to everything: to sealing, to pushing, and to a server that does not answer."""
        return (
            self._dropping is None
            and self._rounds.reading
            and self._status.online
            and self._spool.bytes < self._spool.bytes_max * RESUME_FRACTION
            and self._behind < 2 * WINDOW_BYTES
            and time.monotonic() >= self._copy_pause_until
            and not self._rounds.gives_way(self._spool.bytes)
        )

    @property
    def _behind(self) -> int:
        return 0 if self._cursor is None else self._raw.drained - self._cursor.raw

    async def _wait(self, due: float) -> None:
        """Until ``due``, an order, or something to do before it."""
        self._wake.clear()
        while (left := due - time.monotonic()) > 0 and not self._orders:
            if not self._orders.held and (
                self._behind >= WINDOW_BYTES or (self._dropping is None and self._rounds.urgent) or self._may_copy
            ):
                return
            try:
                async with asyncio.timeout(min(left, self._pace.look_s(self._raw.drained))):
                    await self._wake.wait()
                self._wake.clear()
            except TimeoutError:
                continue

    async def _copy(self, due: float) -> None:
        if not self._may_copy:
            return
        try:
            await self._rounds.read_until(due)
            self._status.works("copy")
        except CdpError as error:
            self._status.failed("copy", error)
            self._copy_pause_until = time.monotonic() + 5.0

    async def _cut(self) -> Spooled | None:
        """Seal or drop everything up to a new mark. The segment that ends at the mark, if there is one."""
        mark = await self._mark()
        if mark is None:
            await self._seal_ahead()
            return None
        losses = self._session.losses()
        cut = Cut.at(mark)
        self._look(losses, cut)
        if self._dropping == "spool-full" and self._spool.bytes < self._spool.bytes_max * RESUME_FRACTION:
            self._dropping = None
        if self._dropping is not None:
            await self._drop_to(cut)
            return None
        entry = await self._seal_to(cut, losses, final=True)
        if entry is not None and self._cursor is not None:
            finished = self._rounds.at_cut(
                self._cursor.position, losses.generation, cut.monotonic_ns, complete=losses.complete
            )
            if finished is not None:
                log.info("%s is complete (%s)", finished.kind, finished.reason)
        return entry

    async def _seal_ahead(self) -> None:
        """Seal whole windows of the second that goes on; or, without a mark, what there is."""
        assert self._cursor is not None or self._dropping is not None
        cut = Cut.at(Mark(time.monotonic_ns(), self._raw.drained))
        if self._dropping is not None:
            await self._drop_to(cut)
        elif self._cursor is not None and (cut.position > self._cursor.raw or self._cursor.open_bios):
            await self._seal_to(cut, self._session.losses(), final=False)

    async def _mark(self) -> Mark | None:
        try:
            return await self._raw.wait_mark(time.monotonic_ns(), MARK_DEADLINE_S)
        except TimeoutError:
            return None

    async def _seal_to(self, cut: Cut, losses: Losses, *, final: bool) -> Spooled | None:
        rounds = self._rounds
        while True:
            assert self._cursor is not None
            if not self._spool.has_room(SEGMENT_ROOM_BYTES):
                self._drop("spool-full")
                await self._drop_to(cut)
                return None
            end = min(self._cursor.raw + WINDOW_BYTES, cut.position)
            clean = rounds.clean(losses.generation) and losses.complete and not self._disks_changed
            seal = functools.partial(
                self._sealer.seal,
                msgspec.structs.replace(self._cursor, dealt=rounds.dealt, round=rounds.current),
                end,
                cut,
                flags=Flags.NONE if clean else Flags.FUZZY,
                dirty=rounds.dirty,
                copier=rounds.copier,
                final=final and end == cut.position,
                hurry=self._behind >= HURRY_BYTES,
            )
            self._cursor, entry = await asyncio.get_running_loop().run_in_executor(self._worker, seal)
            self._spool.publish(entry)
            self._status.sealed, self._status.sealed_at_s = entry.position, cut.wall_ns / 1e9
            self._show(fuzzy=not clean)
            self._sealed()
            if end == cut.position:
                return entry

    async def _drop_to(self, cut: Cut) -> None:
        if self._cursor is None:
            self._raw.release(self._raw.drained)
            return
        loop = asyncio.get_running_loop()
        while self._cursor.raw < cut.position:
            end = min(self._cursor.raw + WINDOW_BYTES, cut.position)
            cursor = msgspec.structs.replace(self._cursor, dealt=self._rounds.dealt, round=self._rounds.current)
            self._cursor = await loop.run_in_executor(self._worker, self._sealer.drop, cursor, end, self._rounds.dirty)
        self._show(fuzzy=True)

    def _drop(self, why: Dropping) -> None:
        if self._dropping != why:
            log.warning("dropping what is captured, to be copied later: %s", why)
            self._dropping = why
        self._rounds.interrupt()

    # --- showing ------------------------------------------------------------------------------------------------------
    def _look(self, losses: Losses, cut: Cut) -> None:
        self._status.captured_at_s = cut.wall_ns / 1e9
        self._status.raw_backlog_bytes = self._behind
        if losses.generation != self._lost_generation:
            lost = self._session.lost.events
            if losses.generation != self._rounds.dealt:
                log.warning("writes were lost, so far: %s", lost)
            self._lost_generation, self._status.lost = losses.generation, lost
        self._disks_changed = self._session.disk_changed()
        self._status.disks_changed(self._disks_changed)

    def _show(self, *, fuzzy: bool) -> None:
        current = self._rounds.current
        reason = "lost-writes" if current is None else current.reason
        self._status.history(
            fuzzy=fuzzy,
            reason="disk-changed" if self._disks_changed else self._dropping or reason,
            copying=None if current is None else "seed" if reason == "seed" else current.kind,
            progress=self._rounds.progress(),
            backlog=(self._spool.bytes, len(self._spool.entries)),
        )
