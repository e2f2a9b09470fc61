"""Proof: read everything that is stored of a machine, and say exactly what is damaged and which seconds that costs."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from typing import Final

import msgspec

from cdp.store.errors import StoredDamage
from cdp.store.record import check_record
from cdp.store.records import Entry, Span
from cdp.store.store import Store
from journal.errors import CdpError

_BATCH: Final = 256


class Damage(msgspec.Struct, frozen=True, kw_only=True):
    """``position``: of a damaged segment, None for the base image or the index. No recovery point from ``first_ns`` on
    can be trusted to be served whole, until a resync; None: from the oldest one on."""

    sentence: str
    position: str | None
    first_ns: int | None


class Verified(msgspec.Struct, frozen=True, kw_only=True):
    segments: int
    read_bytes: int
    base_bytes: int
    damages: list[Damage]
    complete: bool

    @property
    def clean(self) -> bool:
        return self.complete and not self.damages


class Verifier:
    """Checks one machine: every record byte for byte, the chain from segment to segment, every row of the index that
    belongs to it, and the base image. ``bytes_per_s_max`` bounds the rate, so that it can run in the background."""

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
        self._rate = bytes_per_s_max
        self._stop = stop or threading.Event().wait
        self._progress = progress
        self._started = time.monotonic()
        self._segments = 0
        self._read_bytes = 0
        self._base_bytes = 0
        self._damages: list[Damage] = []

    def run(self) -> Verified:
        complete = all(self._verify_generation(number) for number in sorted(self._state.generations))
        complete = complete and self._verify_base()
        return Verified(
            segments=self._segments,
            read_bytes=self._read_bytes,
            base_bytes=self._base_bytes,
            damages=self._damages,
            complete=complete,
        )

    def _verify_generation(self, number: int) -> bool:
        last = self._last(number)
        seq = self._first(number)
        previous: bytes | None = self._before(number, seq)
        while seq <= last:
            try:
                entries = self._store.entries(self._state, Span(number, seq, last), _BATCH)
            except CdpError as error:
                self._add(error, None)
                return True
            if not entries:
                if seq <= last and seq >= self._first(number):
                    self._missing(number, seq)
                return True
            for entry in entries:
                if entry.header.seq != seq:
                    self._missing(number, seq)
                elif previous is not None and entry.header.previous != previous:
                    self._damages.append(_damage(f"Segment {number}/{seq} does not follow the one before it.", entry))
                self._verify_entry(entry)
                seq, previous = entry.header.seq + 1, entry.header.digest
                if self._pause():
                    return False
        return True

    def _verify_entry(self, entry: Entry) -> None:
        self._segments += 1
        self._read_bytes += entry.record_bytes
        file = self._store.pool.row(entry.file)
        try:
            if file is not None and file.machine == self._state.machine.uuid:
                check_record(self._store.files, self._store.pool.path(entry.file), file, entry)
                return
            raise StoredDamage(f"Segment file {entry.file} is not the machine's.", remedy="Restore the index.")
        except (StoredDamage, OSError) as error:
            # Folded away between the listing and the reading: no damage.
            if self._store.entry(self._state, entry.header.generation, entry.header.seq) is not None:
                self._add(error, entry)

    def _verify_base(self) -> bool:
        base = self._state.base
        if base is None or base.folded != base.target:
            return True
        image = self._store.base(self._state.machine.uuid, base.root)
        for disk in image.disks():
            for checked, damages in image.verify(disk):
                self._base_bytes += checked
                self._read_bytes += checked
                for damage in damages:
                    self._add(damage, None)
                if self._pause():
                    return False
        return True

    def _first(self, number: int) -> int:
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
            return self._state.generations[number].genesis(self._state.machine.uuid).digest
        base = self._state.base
        target = None if base is None else base.target_position
        return target.digest if target is not None and (target.generation, target.seq + 1) == (number, seq) else None

    def _missing(self, number: int, seq: int) -> None:
        if seq >= self._first(number):
            sentence = f"Segment {number}/{seq} is missing from the index."
            self._damages.append(Damage(sentence=sentence, position=None, first_ns=None))

    def _add(self, error: Exception, entry: Entry | None) -> None:
        sentence = error.sentence if isinstance(error, CdpError) else str(error)
        self._damages.append(_damage(sentence, entry))

    def _pause(self) -> bool:
        """Keep to the rate; True: end here."""
        if self._progress is not None:
            self._progress(self._read_bytes)
        ahead = 0.0
        if self._rate is not None:
            ahead = self._read_bytes / self._rate - (time.monotonic() - self._started)
        return self._stop(ahead) if ahead > 0 else False


def verify(
    store: Store,
    machine: uuid.UUID,
    *,
    bytes_per_s_max: float | None = None,
    progress: Callable[[int], None] | None = None,
) -> Verified:
    """All at once; see ``Verifier`` for doing it in the background."""
    return Verifier(store, machine, bytes_per_s_max=bytes_per_s_max, progress=progress).run()


def _damage(sentence: str, entry: Entry | None) -> Damage:
    if entry is None:
        return Damage(sentence=sentence, position=None, first_ns=None)
    return Damage(sentence=sentence, position=str(entry.header.position), first_ns=entry.header.sealed_at_ns)
