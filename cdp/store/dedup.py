"""Wire dedup, the store's side: hints kept fresh in the background, and chunks found, proven and laid.

    newest recovery point of each machine ─► digests, at a bounded rate ─► ``ChunkIndex``
    (key, proof) of a new machine's chunks ─► hints ─► read ─► proof equal? ─► ``Store.lay``

The proof is the chunk's blake3 digest, keyed with what the server drew for this one prefill: only who holds the content
can give it, so that knowing a digest is not enough to be handed what it stands for.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from blake3 import blake3

from cdp.store.base import BATCH_CHUNKS, CHUNK_BYTES
from cdp.store.chunks import ChunkIndex, Collected, Place
from cdp.store.image import ImageReader
from cdp.store.share import Sharer
from cdp.store.store import Store
from journal.errors import CdpError

log = logging.getLogger(__name__)

LOOK_S: Final = 5.0
"""How often machines are looked at: how long the first one's hints may be missing after its seed."""
REFRESH_NS: Final = 24 * 3600 * 10**9
"""Hints of a machine are renewed after this time. What dedup is for, operating systems and programs, hardly changes."""
_WINDOW_BYTES: Final = 16 << 20
"""Hashed at once, at a recovery point that is let go of right after: a scan of hours must not hold retention."""
_RUN_CHUNKS: Final = 64
"""Neighbouring chunks are read at once, 4 MiB at most."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A chunk that a machine has: its number on the disk, the beginning of its digest, and the proof."""

    number: int
    key: int
    proof: bytes


class Dedup:
    """``start`` begins the background work, which ends with the store."""

    def __init__(
        self,
        store: Store,
        directory: Path,
        *,
        bytes_per_s_max: float,
        refresh_ns: int = REFRESH_NS,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.index = ChunkIndex(directory)
        self._store = store
        self._rate = bytes_per_s_max
        self._refresh_ns = refresh_ns
        self._clock_ns = clock_ns
        self._sharer = Sharer(store)

    def start(self) -> None:
        self._store.start_thread("store-chunks", self._run)

    @property
    def shared_bytes(self) -> int:
        """Of base images, stored once although two machines have them; since the start."""
        return self._sharer.shared_bytes

    # --- finding ------------------------------------------------------------------------------------------------------
    def fill(self, machine: uuid.UUID, key: str, disk: int, wanted: Sequence[Wanted]) -> int:
        """Lay what the store has of ``wanted`` (ascending numbers) below ``machine``; how many chunks that were.
        Raises what ``Store.lay`` raises."""
        self._store.check_prefill(machine, key)  # also where nothing is found: what was laid before may be gone
        hints = self.index.find(np.array([one.key for one in wanted], np.uint64))
        laid = 0
        for first in range(0, len(wanted), BATCH_CHUNKS):
            batch = [
                (one, places)
                for one, places in zip(wanted[first:][:BATCH_CHUNKS], hints[first:][:BATCH_CHUNKS], strict=True)
                if places
            ]
            found = self._find(bytes.fromhex(key), batch)
            if found:
                rows = [(number * CHUNK_BYTES, memoryview(found[number][1])) for number in sorted(found)]
                self._store.lay(machine, key, disk, rows)
                self._sharer.share(machine, disk, {number: place for number, (place, _) in found.items()})
                laid += len(found)
        return laid

    def _find(self, key: bytes, batch: list[tuple[Wanted, list[Place]]]) -> dict[int, tuple[Place, bytes]]:
        """Number of a wanted chunk -> where it was and its proven content."""
        found: dict[int, tuple[Place, bytes]] = {}
        with ExitStack() as stack:
            readers: dict[uuid.UUID, ImageReader | None] = {}
            for attempt in range(max((len(places) for _, places in batch), default=0)):
                asked = [
                    (places[attempt], one) for one, places in batch if attempt < len(places) and one.number not in found
                ]
                for run in _runs(sorted(asked, key=lambda row: (row[0].machine, row[0].disk, row[0].number))):
                    place = run[0][0]
                    if place.machine not in readers:
                        readers[place.machine] = self._reader(stack, place.machine)
                    for (at, one), content in zip(run, _read(readers[place.machine], run), strict=True):
                        if blake3(content, key=key).digest() == one.proof:
                            found[one.number] = at, content
        return found

    def _reader(self, stack: ExitStack, machine: uuid.UUID) -> ImageReader | None:
        with suppress(CdpError):  # it has been removed, or offers nothing any more: the hint is stale
            point = self._store.last_recovery_point(machine)
            if point is not None:
                return stack.enter_context(ImageReader(self._store, machine, point))
        return None

    # --- keeping the hints --------------------------------------------------------------------------------------------
    def _run(self) -> None:
        while not self._store.stopping.wait(LOOK_S):
            self.refresh(self._store.stopping)

    def refresh(self, stop: threading.Event) -> None:
        """Write the hints of every machine that has none, or old ones; drop those of machines that are gone."""
        machines = {machine.uuid for machine in self._store.list_machines()}
        for gone in set(self.index.machines()) - machines:
            self.index.drop(gone)
        for machine in machines:
            built = self.index.built_at_ns(machine)
            if stop.is_set() or (built is not None and self._clock_ns() - built < self._refresh_ns):
                continue
            # Damage is for the verification to tell, a full disk for ingest: here it means no hints this time.
            try:
                self._build(machine, stop)
            except (CdpError, OSError) as error:
                log.info("no hints of machine %s: %s", machine, error)

    def _build(self, machine: uuid.UUID, stop: threading.Event) -> None:
        if self._store.last_recovery_point(machine) is None:
            return
        now_ns, collected = self._clock_ns(), Collected()
        for disk in self._store.machine(machine).disks:
            for offset in range(0, disk.size_bytes // CHUNK_BYTES * CHUNK_BYTES, _WINDOW_BYTES):
                length = min(_WINDOW_BYTES, (disk.size_bytes - offset) // CHUNK_BYTES * CHUNK_BYTES)
                if collected.full or stop.is_set():
                    break
                digests = self._digests(machine, disk.index, offset, length)
                collected.add(disk.index, offset // CHUNK_BYTES, digests)
                # Holes cost nothing, so only what had to be read counts.
                stop.wait(_filled(digests) * CHUNK_BYTES / self._rate)
        if not stop.is_set():
            self.index.replace(machine, *collected.arrays(), now_ns)

    def _digests(self, machine: uuid.UUID, disk: int, offset: int, length: int) -> bytes:
        point = self._store.last_recovery_point(machine)
        if point is None:
            return b""  # a comparison has begun: what follows is for the next time
        with ImageReader(self._store, machine, point) as image:
            return image.hashes(disk, offset, length, CHUNK_BYTES)


def _runs(asked: list[tuple[Place, Wanted]]) -> Iterator[list[tuple[Place, Wanted]]]:
    """Neighbouring places together."""
    run: list[tuple[Place, Wanted]] = []
    for row in asked:
        if run:
            last, place = run[-1][0], row[0]
            follows = (place.machine, place.disk, place.number) == (last.machine, last.disk, last.number + 1)
            if not follows or len(run) == _RUN_CHUNKS:
                yield run
                run = []
        run.append(row)
    if run:
        yield run


def _read(reader: ImageReader | None, run: list[tuple[Place, Wanted]]) -> list[bytes]:
    """The content at the places of a run; empty where it is not there to be read any more, or damaged."""
    if reader is None:
        return [b""] * len(run)
    place = run[0][0]
    with suppress(CdpError, OSError):
        data = reader.read(place.disk, place.number * CHUNK_BYTES, len(run) * CHUNK_BYTES)
        return [data[at : at + CHUNK_BYTES] for at in range(0, len(data), CHUNK_BYTES)]
    return [b""] if len(run) == 1 else [content for row in run for content in _read(reader, [row])]


def _filled(digests: bytes) -> int:
    """How many of these chunks are not zeros."""
    return int(np.frombuffer(digests, np.uint64).reshape(-1, 4).any(axis=1).sum())
