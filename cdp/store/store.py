"""The store as callers see it: ``Store.open`` and the layers that it is made of.

``Core`` ← ``Machines`` ← ``Ingest`` ← ``Reading`` ← ``Amounts`` ← ``Ledger`` ← ``Imaging`` ← ``Retention`` ← ``Store``:
each layer uses only those before it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from cdp.store.core import EARLY_BYTES, FILE_BYTES, FLUSH_INTERVAL_S, MAP_BYTES, SPARES_MAX
from cdp.store.files import Files, OsFiles
from cdp.store.prefill import Prefill
from journal.errors import CdpError


class Store(Prefill):
    @classmethod
    def open(
        cls,
        directory: Path | str,
        *,
        file_bytes: int = FILE_BYTES,
        map_bytes: int = MAP_BYTES,
        spares_max: int = SPARES_MAX,
        flush_interval_s: float = FLUSH_INTERVAL_S,
        early_bytes: int = EARLY_BYTES,
        fs: Files | None = None,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> Store:
        """Open the store, making an empty one of an empty directory.

        ``file_bytes``: preallocated segment files; ``map_bytes``: most that the index may grow to; ``spares_max``:
        emptied files kept for reuse; ``flush_interval_s``: how long an acknowledged segment may miss in the index;
        ``early_bytes``: segments of that size are written while they are being verified.
        Raises ``StoreLocked``, ``StoreFormatUnknown``, ``StoreFailed``, ``IndexDamaged``.
        """
        store = cls(
            Path(directory),
            file_bytes=file_bytes,
            map_bytes=map_bytes,
            spares_max=spares_max,
            flush_interval_s=flush_interval_s,
            early_bytes=early_bytes,
            files=fs or OsFiles(),
            clock_ns=clock_ns,
        )
        try:
            store._after_open()
        except BaseException:
            store.abandon()
            raise
        return store

    def _after_open(self) -> None:
        """Finish what a crash interrupted."""
        self.discard_prefills()
        for state in list(self._states.values()):
            machine = state.machine
            # What cannot be finished now must not keep the other machines from being served; whoever asks for it
            # next, be it retention or a reader, gets the error.
            with suppress(CdpError):
                if machine.removing:
                    self.finish_removal(machine.uuid)
                    continue
                self.finish_fold(state)
            if state.lost_after is not None:
                details = {"last_good": str(state.lost_after)}
                self.audit("store", "acknowledged segments found damaged at start", str(machine.uuid), details)

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
