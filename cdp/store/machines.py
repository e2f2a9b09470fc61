"""Machines, their disks and their generations."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from itertools import islice
from typing import Final

import msgspec

from cdp.store.core import Core
from cdp.store.errors import MachineExists, UnknownMachine, UnknownPosition
from cdp.store.records import Entry, Generation, Machine, generation_key
from cdp.store.state import MachineState
from journal.extent import DISK_BYTES_MAX, DISKS_MAX
from journal.position import Position
from journal.segment import Header
from journal.wire import DiskInfo

NAME_BYTES_MAX: Final = 200
"""LMDB keys end at 511 bytes."""
_REMOVE_BATCH: Final = 2048
"""Rows per commit while a machine is being removed, so that a small index is enough for it."""


class Machines(Core):
    def create_machine(self, name: str, disks: Sequence[DiskInfo] = ()) -> Machine:
        """A new machine in generation 1, on all-zero disks. Raises ``MachineExists``, ``StoreFull``."""
        _check_name(name)
        _check_disks(disks)
        machine = Machine(uuid=uuid.uuid4(), name=name, disks=list(disks), created_at_ns=self.clock_ns())
        first = Generation(number=1, parent=None, reason="created", started_at_ns=machine.created_at_ns)
        with self._states_lock:
            self._check_free(name)
            with self.index.write() as txn:
                txn.put_row("machines", machine.uuid.bytes, machine)
                txn.put_row("generations", generation_key(machine.uuid, 1), first)
            self._states[machine.uuid] = MachineState(machine, {1: first}, first.genesis(machine.uuid), None)
            self._names[name] = machine.uuid
        return machine

    def machine(self, name_or_uuid: str | uuid.UUID) -> Machine:
        """By name, UUID or printed UUID. Raises ``UnknownMachine``."""
        if isinstance(name_or_uuid, uuid.UUID):
            return self.state(name_or_uuid).machine
        with self._states_lock:
            found = self._names.get(name_or_uuid)
        if found is None:
            try:
                found = uuid.UUID(name_or_uuid)
            except ValueError:
                raise UnknownMachine(
                    f"There is no machine {name_or_uuid!r}.",
                    remedy="See 'cdp machines' for those that exist.",
                    machine=name_or_uuid,
                ) from None
        return self.state(found).machine

    def list_machines(self) -> list[Machine]:
        """By name."""
        with self._states_lock:
            machines = [state.machine for state in self._states.values() if not state.machine.removing]
        return sorted(machines, key=lambda machine: machine.name)

    def rename_machine(self, machine: uuid.UUID, name: str) -> Machine:
        _check_name(name)
        state = self.state(machine)
        with state.writing, self._states_lock:
            if name != state.machine.name:
                self._check_free(name)
            return self._change(state, name=name)

    def update_disks(self, machine: uuid.UUID, disks: Sequence[DiskInfo]) -> Machine:
        """What the agent reports: also how a disk that has grown, or a new one, becomes known."""
        _check_disks(disks)
        state = self.state(machine)
        with state.writing, self._states_lock:
            if list(disks) == state.machine.disks:
                return state.machine
            return self._change(state, disks=list(disks))

    def remove_machine(self, machine: uuid.UUID) -> None:
        """Delete the machine and everything stored of it. Once it is marked, a restart goes on where this stopped."""
        state = self.state(machine)
        with state.writing:
            self.flush()
            with self._states_lock:
                old_name = state.machine.name
                removing = msgspec.structs.replace(state.machine, removing=True)
                with self.index.write() as txn:
                    txn.put_row("machines", machine.bytes, removing)
                    txn.delete("tails", machine.bytes)
                    if state.file is not None:
                        row = msgspec.structs.replace(
                            self.pool.row(state.file.number) or state.file, segments=state.file_segments
                        )
                        self.pool.commit(txn, row)
                if state.file is not None:
                    self.pool.committed(row)
                state.machine = removing
                del self._names[old_name]
            if state.handle >= 0:
                self.files.close(state.handle)
            state.handle, state.file = -1, None
        self.finish_removal(machine)

    def finish_removal(self, machine: uuid.UUID) -> None:
        """Delete the rows of a machine that is marked as removing, then the machine itself."""
        key = machine.bytes
        more = True
        while more:
            with self.index.write() as txn:
                counts: dict[int, int] = {}
                rows = list(islice(txn.scan("segments", key, key), _REMOVE_BATCH))
                for found, value in rows:
                    number = Entry.unpack(value).file
                    counts[number] = counts.get(number, 0) + 1
                    txn.delete("segments", found)
                changed = self.pool.removed(txn, counts)
                more = len(rows) == _REMOVE_BATCH
                for table in ("times", "tallies", "cursors", "bookmarks", "generations", "bases"):
                    rows = list(islice(txn.scan(table, key, key), _REMOVE_BATCH))
                    for found, _ in rows:
                        txn.delete(table, found)
                    more = more or len(rows) == _REMOVE_BATCH
                if not more:
                    for row in self.pool.left_by(machine, changed):
                        self.pool.commit(txn, row)
                        changed.append(row)
                    txn.delete("machines", key)
            for row in changed:
                self.pool.committed(row)
        with self._states_lock:
            self._states.pop(machine, None)
        self.pool.trim(self.index)

    def start_generation(self, machine: uuid.UUID, parent: Position | None, reason: str) -> Position:
        """The next generation, on top of ``parent`` (any stored position of any generation) or of all-zero disks.

        Durable on return; from then on segments of the generation before it are refused. Returns its genesis. Raises
        ``UnknownPosition``.
        """
        state = self.state(machine)
        with state.writing:
            if parent is not None and not self.is_stored(state, parent):
                raise unknown_position(machine, parent)
            generation = Generation(
                number=max(state.generations) + 1,
                parent=None if parent is None else str(parent),
                reason=reason,
                started_at_ns=self.clock_ns(),
            )
            with self.index.write() as txn:
                entries = self.write_pending(txn, state)
                txn.put_row("generations", generation_key(machine, generation.number), generation)
            self.forget_pending(state, entries)
            with state.lock:
                state.generations[generation.number] = generation
                state.tip, state.tip_entry = generation.genesis(machine), None
                state.recovery_point = self.find_recovery_point(state)
                state.lost_after = state.first_point_ns = None
                state.check()
            return state.tip

    def live(self, machine: uuid.UUID) -> Position:
        """The tip of the live generation: its last durable segment, or its genesis."""
        return self.state(machine).tip

    def live_header(self, machine: uuid.UUID) -> Header | None:
        """The header of the tip; None while the live generation has no segment."""
        entry = self.state(machine).tip_entry
        return None if entry is None else entry.header

    def generations(self, machine: uuid.UUID) -> list[Generation]:
        """The oldest first; the last one is live."""
        state = self.state(machine)
        with state.lock:
            return [state.generations[number] for number in sorted(state.generations)]

    def entry(self, state: MachineState, generation: int, seq: int) -> Entry | None:
        """Where a segment lies, or None if it is not stored."""
        with state.lock:
            if generation == state.tip.generation and seq in state.pending:
                return state.pending[seq]
        with self.index.read() as txn:
            return txn.segment(state.machine.uuid, generation, seq)

    def is_stored(self, state: MachineState, position: Position) -> bool:
        """Is the image at ``position`` there, on whatever branch?"""
        if position.generation not in state.generations or not state.is_offered(position):
            return False
        if state.is_base(position):
            return True
        if position.is_genesis:
            generation = state.generations[position.generation]
            parent = generation.parent_position
            known = generation.genesis(state.machine.uuid) == position
            return known and (parent is None or self.is_stored(state, parent))
        entry = self.entry(state, position.generation, position.seq)
        return entry is not None and entry.header.position == position

    def _check_free(self, name: str) -> None:
        if name in self._names:
            raise MachineExists(
                f"There is a machine {name!r} already.",
                remedy="Choose another name, or remove that machine first.",
                name=name,
            )

    def _change(self, state: MachineState, **changes: object) -> Machine:
        machine = msgspec.structs.replace(state.machine, **changes)
        with self.index.write() as txn:
            txn.put_row("machines", machine.uuid.bytes, machine)
        del self._names[state.machine.name]
        self._names[machine.name] = machine.uuid
        state.machine = machine
        return machine


def unknown_position(machine: uuid.UUID, position: Position) -> UnknownPosition:
    return UnknownPosition(
        f"Position {position.short} is not stored.",
        remedy="It was never stored, belongs to another history, or has been folded away; see 'cdp status'.",
        machine=str(machine),
        position=str(position),
    )


def _check_name(name: str) -> None:
    if not name or not name.isprintable() or len(name.encode()) > NAME_BYTES_MAX:
        raise ValueError(f"a machine's name has 1 to {NAME_BYTES_MAX} printable bytes")


def _check_disks(disks: Sequence[DiskInfo]) -> None:
    indexes = [disk.index for disk in disks]
    if len(set(indexes)) != len(indexes) or any(not 0 <= index < DISKS_MAX for index in indexes):
        raise ValueError(f"disks are numbered 0 to {DISKS_MAX - 1}, each number once")
    if any(not 0 < disk.size_bytes <= DISK_BYTES_MAX or disk.size_bytes % 512 for disk in disks):
        raise ValueError("a disk's size is a positive multiple of 512 bytes")
