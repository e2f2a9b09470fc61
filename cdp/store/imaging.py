"""What image readers share: the point-in-time index of each machine, the frame cache, and the positions in use."""

from __future__ import annotations

import threading
import uuid
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from cdp.store.base import BaseImage
from cdp.store.errors import StoreFailed
from cdp.store.files import remove_tree
from cdp.store.frames import Frames
from cdp.store.ledger import Ledger
from cdp.store.machines import unknown_position
from cdp.store.points import Points
from cdp.store.record import read_extents
from cdp.store.records import Base, Entry, Span
from cdp.store.runfile import PageCache, RunShelf
from cdp.store.state import MachineState
from cdp.store.versions import Versions
from journal.errors import CdpError
from journal.extent import Extents
from journal.position import Position

_INDEX_INTERVAL_S: Final = 5.0
_INDEX_BEHIND_MAX: Final = 256
"""Segments that a reader may have to index first: some milliseconds."""


class _Tables:
    """The extent tables of one machine's stored segments."""

    def __init__(self, store: Ledger, state: MachineState) -> None:
        self._store = store
        self._state = state

    def entries(self, span: Span, limit: int) -> list[Entry]:
        return self._store.entries(self._state, span, limit)

    def extents(self, entry: Entry) -> Extents:
        try:
            return read_extents(self._store.files, self._store.pool.path(entry.file), entry)
        except OSError as error:
            raise StoreFailed(f"A segment cannot be read: {error}.", remedy="Check the store's disk.") from error


class Imaging(Points):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.frames = Frames(self)
        self._pages = PageCache()
        self._versions: dict[uuid.UUID, Versions] = {}
        self._bases: dict[tuple[uuid.UUID, int], BaseImage] = {}
        self._pins: dict[uuid.UUID, Counter[Position]] = {}
        self._imaging_lock = threading.Lock()
        self.start_thread("store-index", self._run_indexer)

    def versions(self, machine: uuid.UUID) -> Versions:
        state = self.state(machine)
        with self._imaging_lock:
            known = self._versions.get(machine)
            if known is None:

                def digest_at(generation: int, seq: int) -> bytes | None:
                    entry = self.entry(state, generation, seq)
                    return None if entry is None else entry.header.digest

                shelf = RunShelf(self.files, self.directory / "runs" / str(machine), machine, self._pages, digest_at)
                known = self._versions[machine] = Versions(_Tables(self, state), shelf)
            return known

    def base(self, machine: uuid.UUID, root: int) -> BaseImage:
        """The base image of the lineage that began with generation ``root``; all zeros if nothing has been folded."""
        with self._imaging_lock:
            known = self._bases.get((machine, root))
            if known is None:
                known = BaseImage(self.files, self.base_directory(machine, root))
                self._bases[machine, root] = known
            return known

    def base_directory(self, machine: uuid.UUID, root: int) -> Path:
        return self.directory / "base" / str(machine) / str(root)

    def pin(self, machine: uuid.UUID, position: Position) -> None:
        """Somebody reads the image at ``position``: retention does not fold past it until ``unpin``. Raises
        ``UnknownPosition``."""
        state = self.state(machine)
        with self._imaging_lock:
            if not self.is_stored(state, position):
                raise unknown_position(machine, position)
            self._pins.setdefault(machine, Counter())[position] += 1

    def unpin(self, machine: uuid.UUID, position: Position) -> None:
        with self._imaging_lock:
            pins = self._pins[machine]
            pins[position] -= 1
            if not pins[position]:
                del pins[position]

    def sealed_at_ns(self, machine: uuid.UUID, position: Position) -> int:
        """When the image at ``position`` was the present: 0 for all-zero disks. Raises ``UnknownPosition``."""
        state = self.state(machine)
        with state.lock:
            base = state.base
            parent = state.generations[position.generation].parent_position if position.is_genesis else None
        if base is not None and base.target_position == position:
            return base.sealed_at_ns
        if position.is_genesis:
            return 0 if parent is None else self.sealed_at_ns(machine, parent)
        return self.header(machine, position).sealed_at_ns

    def set_base(self, state: MachineState, base: Base) -> Position | None:
        """Offer nothing older than ``base.target`` any more, unless somebody reads there: then that position."""
        with self._imaging_lock, state.lock:
            for pinned in self._pins.get(state.machine.uuid, ()):
                lineage = state.lineage(pinned)
                if lineage[0].generation <= base.root and not any(base.target_position in span for span in lineage):
                    return pinned
            state.base = base
            return None

    def _run_indexer(self) -> None:
        """Keep the point-in-time index of every machine close to its tip, so that no reader has to wait for it."""
        while not self._stopping.wait(_INDEX_INTERVAL_S):
            for machine in self.list_machines():
                # A machine that is being removed, or damage: whoever reads that machine is told.
                with suppress(CdpError):
                    state = self.state(machine.uuid)
                    with state.lock:
                        live = state.unfolded(state.lineage())[-1]
                    versions = self.versions(machine.uuid)
                    if versions.behind(live) >= _INDEX_BEHIND_MAX:
                        versions.catch_up([live], self._stopping.is_set)

    def finish_removal(self, machine: uuid.UUID) -> None:
        super().finish_removal(machine)
        with self._imaging_lock:
            self._versions.pop(machine, None)
            self._bases = {key: base for key, base in self._bases.items() if key[0] != machine}
        remove_tree(self.directory / "runs" / str(machine))
        remove_tree(self.directory / "base" / str(machine))
