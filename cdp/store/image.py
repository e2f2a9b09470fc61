"""A disk of a machine as it was at a position: random reads, extents, hashes, and segments for a standby's seed.

position ─► lineage (spans of generations, the oldest first) ─► pieces of a range ─► payload frames
                                                                                └─► base image, or zeros
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from types import TracebackType
from typing import Final

import numpy as np
from blake3 import blake3

from cdp.store.errors import RangeTooLarge, UnknownDisk
from cdp.store.frames import SegmentGone
from cdp.store.records import Span
from cdp.store.resolve import BASE, Pieces
from cdp.store.store import Store
from journal.encoder import Encoder
from journal.extent import SECTOR_BYTES, Extents, Kind
from journal.position import DIGEST_BYTES, Position
from journal.segment import PAYLOAD_BYTES_MAX
from journal.wire import GENESIS_IMAGE_SEQ, DiskInfo

READ_BYTES_MAX: Final = 64 << 20
"""One ``read``: bounds the memory of whoever asks."""
_HASH_BATCH_BYTES: Final = 8 << 20
_ZEROS: Final = memoryview(bytes(1 << 20))
CHUNK_BYTES_MAX: Final = 16 << 20
HASHES_MAX: Final = 1 << 16
"""Digests in one answer: 2 MiB."""


class ImageReader:
    """All disks of a machine at ``position``, any stored one, also in a fuzzy interval. Thread-safe.

    While it is open, retention does not fold past it: close it. Raises ``UnknownPosition``, ``UnknownMachine``.
    """

    def __init__(self, store: Store, machine: uuid.UUID, position: Position) -> None:
        self.machine = store.machine(machine)
        self.position = position
        self._store = store
        self._state = store.state(machine)
        self._versions = store.versions(machine)
        store.pin(machine, position)
        try:
            self._base = store.base(machine, self._state.root(position))
            self._versions.catch_up(self._spans())
        except BaseException:
            store.unpin(machine, position)
            raise
        self._open = True

    def close(self) -> None:
        if self._open:
            self._open = False
            self._store.unpin(self.machine.uuid, self.position)

    def __enter__(self) -> ImageReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def disk(self, disk: int) -> DiskInfo:
        """Raises ``UnknownDisk``."""
        found = self._store.machine(self.machine.uuid).disk(disk)
        if found is None:
            raise UnknownDisk(
                f"Machine {self.machine.name!r} has no disk {disk}.", remedy="'cdp status' lists its disks.", disk=disk
            )
        return found

    def read(self, disk: int, offset: int, length: int) -> bytes:
        """At most ``READ_BYTES_MAX`` bytes, any alignment. Raises ``UnknownDisk`` if they are not all on the disk,
        ``RangeTooLarge``, ``StoredDamage``."""
        return bytes(self.view(disk, offset, length))

    def view(self, disk: int, offset: int, length: int) -> memoryview:
        """As ``read``, without a last copy."""
        self._check_range(disk, offset, length)
        if length > READ_BYTES_MAX:
            raise _too_large(length, READ_BYTES_MAX)
        start = offset - offset % SECTOR_BYTES
        stop = -(-(offset + length) // SECTOR_BYTES) * SECTOR_BYTES
        out = memoryview(bytearray(stop - start))
        for pieces in self._pieces(disk, start, stop - start):
            self._fill(out, start, disk, pieces)
        return out[offset - start : offset - start + length]

    def read_into(self, disk: int, offset: int, out: memoryview) -> None:
        """As ``read``, into a buffer of the caller's; multiples of 512 only."""
        self._check_range(disk, offset, len(out), SECTOR_BYTES)
        if len(out) > READ_BYTES_MAX:
            raise _too_large(len(out), READ_BYTES_MAX)
        for pieces in self._pieces(disk, offset, len(out)):
            self._fill(out, offset, disk, pieces)

    def extents(self, disk: int, offset: int, length: int) -> list[tuple[int, int, bool]]:
        """``(offset, length, is_hole)``, consecutive, alternating; a hole reads as zeros. Multiples of 512 only."""
        return list(self.walk_extents(disk, offset, length))

    def walk_extents(self, disk: int, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """As ``extents``, one by one: for ranges that may have millions."""
        self._check_range(disk, offset, length, SECTOR_BYTES)
        return self._extents(disk, offset, length)

    def data_extents(self, disk: int) -> Iterator[tuple[int, int]]:
        """``(offset, length)`` of everything on the disk that is not a hole, ascending."""
        for start, size, is_hole in self._extents(disk, 0, self.disk(disk).size_bytes):
            if not is_hole:
                yield start, size

    def image_segment(self, disk: int, offset: int, length: int) -> bytes:
        """The range as one segment (``wire.IMAGE``): its data as extents, holes left out. Multiples of 512 only.

        Raises ``RangeTooLarge`` if it has more data than a segment holds.
        """
        self._check_range(disk, offset, length, SECTOR_BYTES)
        data: list[tuple[int, int]] = []
        total = 0
        for start, size, is_hole in self._extents(disk, offset, length):
            if is_hole:
                continue
            if total + size > PAYLOAD_BYTES_MAX:
                raise _too_large(length, start + PAYLOAD_BYTES_MAX - total - offset)
            data.append((start, size))
            total += size
        generation, at_ns, monotonic_ns = self.position.generation, 0, 0
        if not self.position.is_genesis and not self._state.is_base(self.position):
            header = self._store.header(self.machine.uuid, self.position)
            at_ns, monotonic_ns = header.sealed_at_ns, header.sealed_monotonic_ns
        _, raw = Encoder(self.machine.uuid).encode(
            Position(generation, GENESIS_IMAGE_SEQ - 1, self.position.digest),
            Extents.from_rows([(disk, start, size, Kind.DATA) for start, size in data]),
            (
                self.read(disk, at, min(_HASH_BATCH_BYTES, start + size - at))
                for start, size in data
                for at in range(start, start + size, _HASH_BATCH_BYTES)
            ),
            opened_at_ns=at_ns,
            sealed_at_ns=at_ns,
            sealed_monotonic_ns=monotonic_ns,
        )
        return bytes(raw)

    def hashes(self, disk: int, offset: int, length: int, chunk: int) -> bytes:
        """One 32-byte blake3 digest per chunk, the last one maybe shorter; all-zero for a chunk that reads as zeros
        (``wire.HASHES``). Multiples of 512 only. Raises ``RangeTooLarge`` beyond ``HASHES_MAX`` chunks."""
        self._check_range(disk, offset, length, SECTOR_BYTES)
        if not SECTOR_BYTES <= chunk <= CHUNK_BYTES_MAX or chunk % SECTOR_BYTES:
            raise ValueError(f"a chunk has {SECTOR_BYTES} to {CHUNK_BYTES_MAX} bytes, a multiple of {SECTOR_BYTES}")
        count = -(-length // chunk)
        if count > HASHES_MAX:
            raise _too_large(length, HASHES_MAX * chunk)
        digests = bytearray(count * DIGEST_BYTES)
        zeros = bytes(chunk)
        for first, last in _chunks_with_data(self.extents(disk, offset, length), offset, chunk, _HASH_BATCH_BYTES):
            start = offset + first * chunk
            data = memoryview(self.read(disk, start, min(offset + length, offset + last * chunk) - start))
            for number in range(first, last):
                piece = data[(number - first) * chunk : (number - first + 1) * chunk]
                if piece != zeros[: len(piece)]:
                    digests[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES] = blake3(piece).digest()
        return bytes(digests)

    def _extents(self, disk: int, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """As ``extents``, one by one."""
        held: tuple[int, int, bool] | None = None
        for pieces in self._pieces(disk, offset, length):
            for part in self._parts(disk, pieces):
                if held is not None and held[2] == part[2]:
                    held = (held[0], held[1] + part[1], held[2])
                else:
                    if held is not None:
                        yield held
                    held = part
        if held is not None:
            yield held

    def _spans(self) -> list[Span]:
        with self._state.lock:
            return self._state.unfolded(self._state.lineage(self.position))

    def _pieces(self, disk: int, offset: int, length: int) -> Iterator[Pieces]:
        return self._versions.pieces(self._spans(), disk, offset, length)

    def _fill(self, out: memoryview, out_start: int, disk: int, pieces: Pieces) -> None:
        """Write all of ``pieces``, segment by segment, so that each frame is decompressed once."""
        wanted: dict[tuple[int, int], list[tuple[int, int, memoryview]]] = {}
        for offset, length, kind, generation, seq, payload_offset in pieces.rows():
            target = out[offset - out_start : offset - out_start + length]
            if kind == Kind.DATA:
                wanted.setdefault((generation, seq), []).append((offset, payload_offset, target))
                continue
            _clear(target)
            if kind == BASE:
                self._base.read_into(disk, offset, target)
        for (generation, seq), parts in wanted.items():
            try:
                self._store.frames.read_parts(
                    ((payload_offset, target) for _, payload_offset, target in parts),
                    (self.machine.uuid, generation, seq),
                )
            except SegmentGone:
                # Folded meanwhile: look again, the base image has it now.
                for offset, _, target in parts:
                    for now in self._pieces(disk, offset, len(target)):
                        self._fill(target, offset, disk, now)

    def _parts(self, disk: int, pieces: Pieces) -> Iterator[tuple[int, int, bool]]:
        """``(offset, length, is_hole)``, neighbours of one kind already joined: there may be millions of pieces."""
        below = BASE if self._base.has(disk) else Kind.ZERO
        kinds = np.where(pieces.kinds == BASE, below, np.where(pieces.kinds == Kind.DATA, Kind.DATA, Kind.ZERO))
        firsts = np.concatenate(([0], np.flatnonzero(np.diff(kinds)) + 1))
        offsets = pieces.offsets[firsts].tolist()
        stops = [*offsets[1:], int(pieces.offsets[-1] + pieces.lengths[-1])]
        for offset, stop, kind in zip(offsets, stops, kinds[firsts].tolist(), strict=True):
            if kind == BASE:
                yield from self._base.extents(disk, offset, stop - offset)
            else:
                yield offset, stop - offset, kind != Kind.DATA

    def _check_range(self, disk: int, offset: int, length: int, unit: int = 1) -> None:
        size_bytes = self.disk(disk).size_bytes
        if offset < 0 or length < 0 or offset + length > size_bytes:
            raise UnknownDisk(
                f"Bytes {offset} to {offset + length} are not all on disk {disk}, which has {size_bytes}.",
                remedy="Ask for a range on the disk.",
                disk=disk,
                size_bytes=size_bytes,
            )
        if offset % unit or length % unit:
            raise ValueError(f"offset and length are multiples of {unit}")


def _chunks_with_data(
    extents: list[tuple[int, int, bool]], offset: int, chunk: int, batch_bytes: int
) -> Iterator[tuple[int, int]]:
    """Half-open ranges of chunk numbers that are not all hole, each of at most ``batch_bytes``, ascending."""
    batch = max(1, batch_bytes // chunk)
    done = 0
    for start, size, is_hole in extents:
        if is_hole:
            continue
        first = max(done, (start - offset) // chunk)
        last = -(-(start + size - offset) // chunk)
        for at in range(first, last, batch):
            yield at, min(at + batch, last)
        done = max(done, last)


def _clear(target: memoryview) -> None:
    for at in range(0, len(target), len(_ZEROS)):
        part = target[at : at + len(_ZEROS)]
        part[:] = _ZEROS[: len(part)]


def _too_large(length: int, fits: int) -> RangeTooLarge:
    fits -= fits % SECTOR_BYTES
    return RangeTooLarge(
        f"A range of {length} bytes does not fit into one answer.",
        remedy=f"Ask for {fits} bytes first, then for the rest.",
        fits_bytes=fits,
    )
