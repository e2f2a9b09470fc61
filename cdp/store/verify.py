"""Proof: read everything that is stored of a machine, and say exactly what is damaged and which seconds that costs.

    index          every row by its sum, every page by finding its rows (``check``)
    segments       every byte of every record, the chain from one to the next, its row among the times
    base image     every chunk by its sum, every sum by its check
    run files      every page by its sum; a damaged one is thrown away and built again, it costs nothing

Bytes that hold nothing (the rest of a segment file, what an earlier use left there, free pages of the index) are not
read; nothing is ever served from them.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from typing import Final

import msgspec

from cdp.store.check import check_index
from cdp.store.damage import Damage, of_chunk, of_segment
from cdp.store.errors import StoredDamage
from cdp.store.record import check_record
from cdp.store.records import Entry, Span, time_key
from cdp.store.runfile import verify_runs
from cdp.store.store import Store
from journal.errors import CdpError

__all__ = ["Damage", "Verified", "Verifier", "verify"]

_BATCH: Final = 256
DAMAGES_MAX: Final = 1000
"""Beyond it the disk is broken, and one more line tells nobody anything."""


class Verified(msgspec.Struct, frozen=True, kw_only=True):
    """``complete``: it was not stopped, and did not give up after ``DAMAGES_MAX``."""

    segments: int
    read_bytes: int
    base_bytes: int
    damages: list[Damage]
    complete: bool
    index_rows: int = 0
    run_files: int = 0

    @property
    def clean(self) -> bool:
        return self.complete and not self.damages


class _Stopped(Exception):
    """Told to end early."""


class Verifier:
    """Checks one machine, and the index that all machines share. ``bytes_per_s_max`` bounds the rate, so that it can
    run in the background; it may be changed meanwhile."""

    def __init__(
        self,
        store: Store,
        machine: uuid.UUID,
        *,
        bytes_per_s_max: float | None = None,
        stop: Callable[[float], bool] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """``stop(seconds)`` waits so long at most and tells whether to end early (``Event.wait`` does); ``progress``
        gets the bytes read."""
        self._store = store
        self._state = store.state(machine)
        self._machine = machine
        self.bytes_per_s_max = bytes_per_s_max
        self._stop = stop or threading.Event().wait
        self._progress = progress
        self._started = time.monotonic()
        self._segments = 0
        self._read_bytes = 0
        self._base_bytes = 0
        self._index_rows = 0
        self._run_files = 0
        self._damages: list[Damage] = []

    def run(self) -> Verified:
        complete = True
        try:
            self._verify_index()
            # Before the segments: what a damaged one costs is looked up in the runs.
            self._verify_runs()
            for number in sorted(self._state.generations):
                self._verify_generation(number)
            self._verify_base()
        except _Stopped:
            complete = False
        return Verified(
            segments=self._segments,
            read_bytes=self._read_bytes,
            base_bytes=self._base_bytes,
            damages=self._damages,
            complete=complete,
            index_rows=self._index_rows,
            run_files=self._run_files,
        )

    def _verify_index(self) -> None:
        checked = check_index(self._store.directory / "index")
        self._index_rows = checked.rows
        for problem in checked.problems:
            self._damaged(Damage(kind="index", sentence=problem))

    def _verify_runs(self) -> None:
        directory = self._store.directory / "runs" / str(self._machine)
        for path, checked, damage in verify_runs(self._store.files, directory, self._machine):
            self._run_files += 1
            self._read_bytes += checked
            if damage is not None:
                self._store.versions(self._machine).discard(damage)
                self._store.files.unlink(path)
                self._damaged(Damage(kind="run", sentence=damage.sentence, first_ns=0, until_ns=0, lost=[]))
            self._pause()

    def _verify_generation(self, number: int) -> None:
        last = self._last(number)
        seq = self._first(number)
        previous: bytes | None = self._before(number, seq)
        while seq <= last:
            try:
                entries = self._store.entries(self._state, Span(number, seq, last), _BATCH)
            except CdpError as error:
                self._damaged(Damage(kind="index", sentence=error.sentence))
                return
            if not entries:
                self._missing(number, seq)
                return
            for entry in entries:
                if entry.header.seq != seq:
                    self._missing(number, seq)
                elif previous is not None and entry.header.previous != previous:
                    self._chain_broken(entry)
                self._verify_entry(entry)
                seq, previous = entry.header.seq + 1, entry.header.digest
                self._pause()

    def _verify_entry(self, entry: Entry) -> None:
        self._segments += 1
        self._read_bytes += entry.record_bytes
        file = self._store.pool.row(entry.file)
        try:
            if file is None or file.machine != self._machine:
                raise StoredDamage(f"Segment file {entry.file} is not the machine's.", remedy="Restore the index.")
            check_record(self._store.files, self._store.pool.path(entry.file), file, entry)
        except (StoredDamage, OSError) as error:
            if self._is_stored(entry):
                self._damaged(of_segment(self._store, self._machine, entry, error))
            return
        if self._times_row_missing(entry) and self._is_stored(entry):
            sentence = f"Segment {entry.header.position.short} is missing among the times."
            self._damaged(Damage(kind="index", sentence=sentence, position=str(entry.header.position)))

    def _is_stored(self, entry: Entry) -> bool:
        """False: it was folded away between the listing and the reading."""
        return self._store.entry(self._state, entry.header.generation, entry.header.seq) is not None

    def _times_row_missing(self, entry: Entry) -> bool:
        with self._store.index.read() as txn:
            if txn.segment(self._machine, entry.header.generation, entry.header.seq) is None:
                return False  # not in the index yet
            return txn.get("times", time_key(self._machine, entry.header)) is None

    def _verify_base(self) -> None:
        base = self._state.base
        if base is not None and base.folded != base.target:
            return  # a fold is under way: it checks what it touches
        root = 1 if base is None else base.root
        image = self._store.base(self._machine, root)
        for disk in image.disks():
            for checked, damages in image.verify(disk):
                self._base_bytes += checked
                self._read_bytes += checked
                for damage in damages:
                    self._damaged(of_chunk(self._store, self._machine, root, damage))
                self._pause()

    def _first(self, number: int) -> int:
        """The first segment of a generation that anything on offer needs."""
        base = self._state.base
        if base is not None and base.folded != base.target:
            # Until the fold is done, the image at its target is read from the segments.
            for span in self._state.unfolded(self._state.lineage(base.target_position)):
                if span.generation == number:
                    return span.first
        spans = {span.generation: span for span in self._state.removable()}
        return spans[number].last + 1 if number in spans else 1

    def _last(self, number: int) -> int:
        """The last segment that was stored of a generation: known for the live one only, found for the others."""
        if number == self._state.tip.generation:
            return self._state.tip.seq
        newest = self._store.newest_entry(self._state, number)
        return 0 if newest is None else newest.header.seq

    def _before(self, number: int, seq: int) -> bytes | None:
        if seq == 1:
            return self._state.generations[number].genesis(self._machine).digest
        base = self._state.base
        for at in (None, None) if base is None else (base.target_position, base.folded_position):
            if at is not None and (at.generation, at.seq + 1) == (number, seq):
                return at.digest
        return None

    def _missing(self, number: int, seq: int) -> None:
        if seq >= self._first(number):
            self._damaged(Damage(kind="index", sentence=f"Segment {number}/{seq} is missing from the index."))

    def _chain_broken(self, entry: Entry) -> None:
        at = entry.header.position
        self._damaged(
            Damage(
                kind="chain",
                sentence=f"Segment {at.short} does not follow the one before it.",
                position=str(at),
                first_ns=entry.header.sealed_at_ns,
            )
        )

    def _damaged(self, damage: Damage) -> None:
        self._damages.append(damage)
        if len(self._damages) >= DAMAGES_MAX:
            raise _Stopped

    def _pause(self) -> None:
        """Keep to the rate; raises ``_Stopped`` if told to end here."""
        if self._progress is not None:
            self._progress(self._read_bytes)
        ahead = 0.0
        if self.bytes_per_s_max is not None:
            ahead = self._read_bytes / self.bytes_per_s_max - (time.monotonic() - self._started)
        if self._stop(max(0.0, ahead)):
            raise _Stopped


def verify(
    store: Store,
    machine: uuid.UUID,
    *,
    bytes_per_s_max: float | None = None,
    progress: Callable[[int], None] | None = None,
) -> Verified:
    """All at once; see ``Verifier`` for doing it in the background."""
    return Verifier(store, machine, bytes_per_s_max=bytes_per_s_max, progress=progress).run()
