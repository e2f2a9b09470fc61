"""What image readers share: the point-in-time index of each machine, the frame cache, and the positions in use."""

from __future__ import annotations

import threading
import uuid
from collections import Counter
from typing import Any

from cdp.store.errors import StoreFailed
from cdp.store.files import remove_tree
from cdp.store.frames import Frames
from cdp.store.ledger import Ledger
from cdp.store.record import read_extents
from cdp.store.records import Entry, Span
from cdp.store.runfile import PageCache, RunShelf
from cdp.store.state import MachineState
from cdp.store.versions import Versions
from journal.extent import Extents
from journal.position import Position


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


class Imaging(Ledger):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.frames = Frames(self)
        self._pages = PageCache()
        self._versions: dict[uuid.UUID, Versions] = {}
        self._pins: dict[uuid.UUID, Counter[Position]] = {}
        self._imaging_lock = threading.Lock()

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

    def read_base(self, machine: uuid.UUID, spans: list[Span], disk: int, offset: int, out: memoryview) -> None:
        """Fill ``out``, which is all zeros, with what lies below the first segment of ``spans``."""

    def base_extents(
        self, machine: uuid.UUID, spans: list[Span], disk: int, offset: int, length: int
    ) -> list[tuple[int, int, bool]]:
        """``(offset, length, is_hole)`` of what lies below the first segment of ``spans``."""
        return [(offset, length, True)]

    def pin(self, machine: uuid.UUID, position: Position) -> None:
        """Somebody reads the image at ``position``: retention must not fold past it until ``unpin``."""
        with self._imaging_lock:
            self._pins.setdefault(machine, Counter())[position] += 1

    def unpin(self, machine: uuid.UUID, position: Position) -> None:
        with self._imaging_lock:
            pins = self._pins[machine]
            pins[position] -= 1
            if not pins[position]:
                del pins[position]

    def pins(self, machine: uuid.UUID) -> list[Position]:
        with self._imaging_lock:
            return list(self._pins.get(machine, ()))

    def finish_removal(self, machine: uuid.UUID) -> None:
        super().finish_removal(machine)
        with self._imaging_lock:
            self._versions.pop(machine, None)
        remove_tree(self.directory / "runs" / str(machine))
