"""What is laid into a new machine's base image before its first segment, because the store has that content already.

The image at the genesis of generation 1 is the base image: zeros, or what was laid there. Everything stored later lies
on top of it, so that standbys, recovery and retention know nothing of this.

    step                               crash after it
    ────────────────────────────────   ─────────────────────────────────────────────────────────────────────────────
    row "filling" committed            the base image is thrown away at the start; the agent begins anew
    chunks laid, sums first            the same
    images and directories synced      the same
    row "filled" (or "none")           done: from now on the image at the genesis does not change any more

Nothing of it is ever a recovery point. It happens only while the machine has no segment, under the machine's
``writing`` lock, and never after it was closed; until then nobody else may read the image (``check_settled``).
"""

from __future__ import annotations

import secrets
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from cdp.store.base import BaseImage
from cdp.store.files import remove_tree, sync_directory
from cdp.store.index import disk_error
from cdp.store.retention import Retention
from cdp.store.state import MachineState
from journal.errors import PrefillClosed, PrefillRestarted, PrefillUnsettled
from journal.position import Position

PrefillState = Literal["filling", "filled", "none"]
_ROOT = 1
"""Only generation 1 begins without a parent and with nobody having read it."""


class PrefillRow(msgspec.Struct, frozen=True, kw_only=True):
    """``key``: hex, drawn for each beginning; ``bytes``: what was laid, once it is closed."""

    state: PrefillState
    key: str = ""
    bytes: int = 0


class Prefill(Retention):
    @property
    def stopping(self) -> threading.Event:
        """Set when the store is being closed: for work in threads of ``start_thread``."""
        return self._stopping

    def base_path(self, machine: uuid.UUID, disk: int) -> Path:
        """The file of the live lineage's base image; it may not be there. Raises ``UnknownMachine``."""
        state = self.state(machine)
        return self.base_directory(machine, state.root(state.tip)) / f"{disk}.img"

    def prefill(self, machine: uuid.UUID) -> PrefillRow | None:
        """None: nothing was begun or closed."""
        raw = self.settings.get(_name(machine))
        return None if raw is None else msgspec.json.decode(raw, type=PrefillRow)

    def may_prefill(self, machine: uuid.UUID) -> bool:
        """Nothing is stored of the machine, and it has not been closed."""
        if not _untouched(self.state(machine)):
            return False
        row = self.prefill(machine)
        return row is None or row.state == "filling"

    def check_settled(self, machine: uuid.UUID) -> None:
        """Raise ``PrefillUnsettled`` while the image at the genesis may still change under a reader."""
        if self.may_prefill(machine):
            raise PrefillUnsettled(
                "The machine's agent has not begun its seed yet.",
                remedy="Wait: it goes on by itself as soon as the agent has stored its first segment.",
                machine=str(machine),
            )

    def begin_prefill(self, machine: uuid.UUID) -> str:
        """Throw away what an earlier attempt has laid and begin; the key that goes with every ``lay``. Raises
        ``PrefillClosed``."""
        state = self.state(machine)
        with state.writing:
            self._check_open(state)
            key = secrets.token_hex(32)
            self._put(machine, PrefillRow(state="filling", key=key))
            self._throw_away(machine)
        return key

    def lay(self, machine: uuid.UUID, key: str, disk: int, chunks: Sequence[tuple[int, memoryview]]) -> None:
        """``(offset, content)``, whole chunks, ascending, at most ``base.BATCH_CHUNKS``. Durable after
        ``end_prefill``. Raises ``PrefillClosed``, ``PrefillRestarted``, ``StoreFull``, ``StoreFailed``."""
        state = self.state(machine)
        with state.writing:
            self.check_prefill(machine, key)
            try:
                self._image(state, disk).fold(disk, [(at, len(content), content) for at, content in chunks])
            except OSError as error:
                raise disk_error(error, "the base image") from error

    def put_segment(self, machine: uuid.UUID, raw: bytes | bytearray | memoryview) -> tuple[Position, bool]:
        """As below. Whoever stores a first segment has begun: what lies below it must stay."""
        state = self.state(machine)
        if not _untouched(state):
            return super().put_segment(machine, raw)
        with state.writing:
            row = self.prefill(machine)
            if row is not None and row.state == "filling":
                self.end_prefill(machine)
            return super().put_segment(machine, raw)

    def end_prefill(self, machine: uuid.UUID) -> PrefillRow:
        """Close it, whether it was begun or not; again: the same answer. Raises ``StoreFull``, ``StoreFailed``."""
        state = self.state(machine)
        with state.writing:
            row = self.prefill(machine)
            if not _untouched(state) or (row is not None and row.state != "filling"):
                return row or PrefillRow(state="none")
            image = self.base(machine, _ROOT)
            filled = bool(image.disks())
            if filled:
                try:
                    for disk in image.disks():
                        image.sync(disk)
                    for directory in (self.base_directory(machine, _ROOT).parent, self.directory / "base"):
                        sync_directory(directory)
                except OSError as error:
                    raise disk_error(error, "the base image") from error
            done = PrefillRow(state="filled" if filled else "none", bytes=image.stored_bytes())
            self._put(machine, done)
        return done

    def discard_prefills(self) -> None:
        """At the start: what was not closed is thrown away, also of machines that are gone."""
        for name, raw in self.settings.items().items():
            if not name.startswith(_name("")):
                continue
            machine = uuid.UUID(name.removeprefix(_name("")))
            if machine in self._states and msgspec.json.decode(raw, type=PrefillRow).state != "filling":
                continue
            self._throw_away(machine)
            self.settings.delete(name)

    def finish_removal(self, machine: uuid.UUID) -> None:
        super().finish_removal(machine)
        self.settings.delete(_name(machine))

    def _image(self, state: MachineState, disk: int) -> BaseImage:
        machine = state.machine
        image = self.base(machine.uuid, _ROOT)
        if not image.has(disk):
            for known in machine.disks:
                image.prepare(known.index, known.size_bytes)
        return image

    def _throw_away(self, machine: uuid.UUID) -> None:
        with self._imaging_lock:
            self._bases.pop((machine, _ROOT), None)
        directory = self.base_directory(machine, _ROOT).parent
        try:
            if directory.exists():
                remove_tree(directory)
                # Otherwise a power cut could bring it back after the row that speaks of it is gone.
                sync_directory(directory.parent)
        except OSError as error:
            raise disk_error(error, "the base image") from error

    def check_prefill(self, machine: uuid.UUID, key: str) -> None:
        """Raise ``PrefillClosed``, or ``PrefillRestarted`` unless ``key`` is the one of the last beginning."""
        self._check_open(self.state(machine))
        row = self.prefill(machine)
        if row is None or row.key != key:
            raise PrefillRestarted(
                "The preparation of the seed was begun anew meanwhile.",
                remedy="The agent begins it again by itself.",
                machine=str(machine),
            )

    def _check_open(self, state: MachineState) -> None:
        if not self.may_prefill(state.machine.uuid):
            raise PrefillClosed(
                "The seed of this machine has begun: nothing can be laid below it any more.",
                remedy="None is needed: the agent sends what the server does not have.",
                machine=str(state.machine.uuid),
            )

    def _put(self, machine: uuid.UUID, row: PrefillRow) -> None:
        self.settings.put(_name(machine), msgspec.json.encode(row))


def _name(machine: uuid.UUID | str) -> str:
    return f"prefill/{machine}"


def _untouched(state: MachineState) -> bool:
    return state.base is None and state.tip.generation == _ROOT and state.tip.is_genesis
