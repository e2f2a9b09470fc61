"""Drives takeovers: asks the planner, stores the intent, acts, stores the result, and again.

    async with TakeoverController(store, ports) as controller:      # resumes what a killed controller left
        record = await controller.take_over(spec, Mode.PLANNED, actor="alice")
        record = await controller.settled(record.id)                # running, terminal, or stalled

One task per active takeover, owned by the controller's task group; a defect in one fails the process visibly. Closing
the controller is the same as killing it: records stay, the next one goes on.

    killed after         the next controller finds         and
    storing an intent    an entry without an outcome       marks it interrupted and repeats the (idempotent) act
    an act's effect      the same                          the same
    storing a result     the result                        plans the next step
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable
from types import TracebackType

from standby.spec import MachineSpec
from standby.takeover.drive import Drive
from standby.takeover.errors import RecordDamaged, TakeoverActive, TakeoverUnknown
from standby.takeover.plan import check_command, has_work
from standby.takeover.ports import Ports
from standby.takeover.record import Options, RecordStore, TakeoverRecord
from standby.takeover.states import Act, Direction, Mode, State


class TakeoverController:
    """All takeovers of a server. Lives in one event loop; use it as an asynchronous context manager."""

    def __init__(
        self, store: RecordStore, ports: Ports, new_id: Callable[[], str] = lambda: uuid.uuid4().hex[:12]
    ) -> None:
        self._store = store
        self._ports = ports
        self._new_id = new_id
        self._records: dict[str, TakeoverRecord] = {}
        self._shown: dict[str, TakeoverRecord] = {}
        """Copies as they are stored: nobody is told what a crash could take back."""
        self._drives: dict[str, Drive] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._saving = asyncio.Lock()
        self._starting: set[str] = set()
        self._changed = asyncio.Condition()
        self._group = asyncio.TaskGroup()
        self._serving = False

    async def __aenter__(self) -> TakeoverController:
        for takeover, raw in (await self._store.load()).items():
            record = TakeoverRecord.decode(raw)
            if record.id != takeover:
                raise RecordDamaged(
                    f"Record {takeover} calls itself {record.id}.",
                    remedy="The store is damaged: restore it from a copy.",
                )
            self._records[record.id] = record
            self._shown[record.id] = TakeoverRecord.decode(raw)
            if record.active and record.stalled is not None:
                record.reopen()  # what it waited for may have come while we were away
                await self._save(record)
        await self._group.__aenter__()
        self._serving = True
        for record in self._records.values():
            if has_work(record):
                self._drive(record)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._serving = False
        for task in self._tasks:
            task.cancel()
        await self._group.__aexit__(kind, error, at)

    # --- commands ---------------------------------------------------------------------------------------------------
    async def take_over(
        self, spec: MachineSpec, mode: Mode, *, actor: str, options: Options | None = None
    ) -> TakeoverRecord:
        """Begin a takeover; returns its record, the work goes on. Raises ``TakeoverActive``.

        An unplanned takeover supersedes one that stalled on the way back to a source that has died meanwhile.
        """
        if spec.machine in self._starting:
            raise TakeoverActive("A takeover of this machine is being started.", remedy="See 'cdp status'.")
        self._starting.add(spec.machine)
        try:
            await self._make_way(spec, mode)
            live = await self._ports.store.live(spec.machine)
            record = TakeoverRecord(
                id=self._new_id(),
                machine=spec.machine,
                mode=mode,
                actor=actor,
                created_s=self._ports.clock.now_s(),
                spec=spec,
                options=options or Options(),
                generation=live.generation + 1,
            )
            await self._save(record)
            self._records[record.id] = record
            self._drive(record)
            return self.record(record.id)
        finally:
            self._starting.discard(spec.machine)

    async def commit(self, takeover: str) -> TakeoverRecord:
        """The standby is the machine from now on. Raises ``TakeoverRefused``."""
        record = self._checked(takeover, "commit")
        await self._finish(record, State.COMMITTED)
        return self.record(takeover)

    async def rollback(self, takeover: str) -> TakeoverRecord:
        """Back to the source; what was written on the standby is lost. Raises ``TakeoverRefused``.

        Before the point of no return this cancels the takeover.
        """
        record = self._checked(takeover, "rollback")
        record.rollback_requested = True
        await self._save(record)
        self._wake(record)
        return self.record(takeover)

    async def retry(self, takeover: str) -> TakeoverRecord:
        """Try again what stalled. Raises ``TakeoverRefused``."""
        record = self._checked(takeover, "retry")
        record.reopen()
        await self._save(record)
        self._wake(record)
        return self.record(takeover)

    async def peer_connected(self, machine: str) -> None:
        """To be called when an agent or a PE connects: what stalled because it was away goes on."""
        for record in [record for record in self._records.values() if record.machine == machine]:
            if record.stalled is not None and record.direction is not Direction.FORWARD:
                await self.retry(record.id)

    async def commit_expired(self) -> list[str]:
        """Commit what has been running for longer than its rollback window; returns their ids. Call it now and then.

        Before that, domains that could not be redefined are tried again: they would boot the PE at their next start.
        """
        for record in list(self._records.values()):  # new ones may come while we wait
            if record.state is State.RUNNING and record.failed(Act.REDEFINE):
                await self.retry(record.id)
                await self.settled(record.id)
        now_s = self._ports.clock.now_s()
        expired = [
            record
            for record in self._records.values()
            if record.state is State.RUNNING
            and not has_work(record)
            and now_s > (record.running_s or now_s) + record.spec.rollback_window_s
        ]
        for record in expired:
            await self._finish(record, State.COMMITTED)
        return [record.id for record in expired]

    # --- asking -----------------------------------------------------------------------------------------------------
    def record(self, takeover: str) -> TakeoverRecord:
        """As it is stored now, a copy. Raises ``TakeoverUnknown``."""
        if takeover not in self._shown:
            raise TakeoverUnknown(f"There is no takeover {takeover}.", remedy="See 'cdp takeovers'.", takeover=takeover)
        return self._shown[takeover]

    def of_machine(self, machine: str) -> list[TakeoverRecord]:
        """The newest first. May be called from any thread."""
        mine = [record for record in list(self._shown.values()) if record.machine == machine]
        return sorted(mine, key=lambda record: record.created_s, reverse=True)

    def latest(self, machine: str) -> TakeoverRecord | None:
        return next(iter(self.of_machine(machine)), None)

    def standby_owns(self, machine: str) -> bool:
        """Does the live generation belong to the standby: may it, and not the source, hold the service addresses?

        True from the moment in which the next generation may be live until it has been given back.
        """
        for record in self.of_machine(machine):
            unbumped = record.direction is Direction.UNDO or (
                record.state is State.FAILED and record.direction is Direction.FORWARD
            )
            if not unbumped and record.begun(Act.GENERATION):
                return not record.done(Act.GENERATION_BACK)
            # This one changed nothing: the one before it decides.
        return False

    def runs_from_standby_disks(self, machine: str) -> bool:
        """Has the replicated system been started from the standby's disks, and not been stopped for a way back?

        From then on they hold what nobody else has: whatever boots on them, replay must not write to them.
        """
        for record in self.of_machine(machine):
            if record.stands(Act.FINISH_BOOT):
                return not record.done(Act.STOP_STANDBY)
        return False

    async def settled(self, takeover: str) -> TakeoverRecord:
        """Wait until nothing more happens by itself: running, terminal or stalled."""
        async for record in self.changes(takeover):
            latest = record
        return latest

    async def changes(self, takeover: str) -> AsyncGenerator[TakeoverRecord, None]:
        """The record now and after each change, until nothing more happens by itself."""
        record = self.record(takeover)
        while True:
            yield record
            if record.version != self.record(takeover).version:
                record = self.record(takeover)
                continue
            if record.stalled is not None or not has_work(record):
                return
            async with self._changed:
                while self.record(takeover).version == record.version:
                    await self._changed.wait()
            record = self.record(takeover)

    # --- inside -----------------------------------------------------------------------------------------------------
    async def _make_way(self, spec: MachineSpec, mode: Mode) -> None:
        for record in [record for record in self._records.values() if record.machine == spec.machine]:
            if record.state is State.RUNNING:
                raise TakeoverActive(
                    f"Takeover {record.id} is running and neither committed nor rolled back.",
                    remedy="Commit it or roll it back first.",
                    takeover=record.id,
                )
            if not record.active:
                continue
            if mode is Mode.UNPLANNED and record.stalled is not None and _standby_is_free(record):
                await self._finish(record, State.FAILED)
                continue
            raise TakeoverActive(
                f"Takeover {record.id} of this machine is active ({record.state}).",
                remedy="Wait for it, retry it if it has stalled, or roll it back; 'cdp status' shows it.",
                takeover=record.id,
                state=record.state.value,
            )

    def _checked(self, takeover: str, command: str) -> TakeoverRecord:
        """The live record, if the command applies to it."""
        self.record(takeover)
        check_command(self._records[takeover], command, self._ports.clock.now_s())
        return self._records[takeover]

    async def _finish(self, record: TakeoverRecord, state: State) -> None:
        record.move(state)
        record.stalled = None
        record.ended_s = self._ports.clock.now_s()
        await self._save(record)

    async def _save(self, record: TakeoverRecord) -> None:
        """Durable first, visible to those who wait afterwards."""
        async with self._saving:  # in the order of the changes
            record.version += 1
            raw = record.encode()
            try:
                await self._store.save(record.id, raw)
            except Exception as error:
                # It may be stored or not: only a new start, which reads what there is, can go on from here.
                if self._serving:
                    self._group.create_task(_raise(error))
                raise
            self._shown[record.id] = TakeoverRecord.decode(raw)
        async with self._changed:
            self._changed.notify_all()

    def _wake(self, record: TakeoverRecord) -> None:
        """The drive looks at the record again; a new one starts if the last has ended."""
        drive = self._drives.get(record.id)
        if drive is None or drive.finished:
            self._drive(record)
        else:
            drive.poke()

    def _drive(self, record: TakeoverRecord) -> None:
        drive = self._drives[record.id] = Drive(record, self._ports, self._save)
        task = self._group.create_task(drive.run(), name=f"takeover {record.id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _standby_is_free(record: TakeoverRecord) -> bool:
    """On its way back and past the point where the standby is part of it: only the source is still waited for."""
    return record.direction is Direction.UNDO or record.done(Act.GENERATION_BACK)


async def _raise(error: Exception) -> None:
    raise error
