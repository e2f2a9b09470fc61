"""A verified segment -> the target disks.

The caller has checked digest and chain; here the extents are checked against the disks before the first byte is
written. Extents of one segment are disjoint, so their order does not matter and applying a segment twice is harmless.

Memory: the segment's encoded bytes and one window of payload.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from journal.decoder import Segment
from journal.extent import Extents, Kind
from journal.segment import FRAME_BYTES
from journal.wire import DiskInfo
from standby.replay.ports import Disk, FlushFailed, TargetFailed, TargetMissing, TargetTooSmall

_WINDOW_BYTES: Final = 4 << 20
assert _WINDOW_BYTES % FRAME_BYTES == 0


@dataclass(frozen=True, slots=True, eq=False)
class Runs:
    """Extents of one kind with neighbours merged: columns of equal length, int64 bytes, ``disks`` the disk numbers.

    ``sources`` is where a run's bytes start in the payload: adjacent data extents are adjacent there too.
    """

    disks: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    sources: npt.NDArray[np.int64]

    @classmethod
    def of(cls, extents: Extents, *kinds: Kind) -> Runs:
        chosen = np.isin(extents.kinds, kinds)
        disks = extents.disks[chosen].astype(np.int64)
        offsets = extents.offsets[chosen].astype(np.int64)
        lengths = extents.lengths[chosen].astype(np.int64)
        sources = extents.payload_offsets()[chosen].astype(np.int64)
        if len(offsets) == 0:
            return cls(disks, offsets, lengths, sources)
        ends = offsets + lengths
        starts_run = np.concatenate(([True], (disks[1:] != disks[:-1]) | (offsets[1:] != ends[:-1])))
        first = np.flatnonzero(starts_run)
        last = np.concatenate((first[1:] - 1, [len(offsets) - 1]))
        return cls(disks[first], offsets[first], ends[last] - offsets[first], sources[first])

    def rows(self) -> Iterator[tuple[int, int, int, int]]:
        """``(disk, offset, length, source)``"""
        columns = (self.disks, self.offsets, self.lengths, self.sources)
        return zip(*(column.tolist() for column in columns), strict=True)


class Applier:
    """Owns the target disks of one machine, by disk number. Blocking; one caller at a time."""

    def __init__(self, disks: Mapping[int, Disk]) -> None:
        self.disks = disks
        self._window = memoryview(mmap.mmap(-1, _WINDOW_BYTES))

    def check_disks(self, sources: list[DiskInfo]) -> None:
        """Raise ``TargetMissing`` or ``TargetTooSmall`` unless every protected disk fits its target."""
        for source in sources:
            target = self.disks.get(source.index)
            if target is None:
                raise TargetMissing(
                    f"Disk {source.index} ({source.name}) of the machine has no target disk.",
                    remedy="Attach a disk of at least its size to the standby: 'cdp standby define' does so.",
                    disk=source.index,
                    size_bytes=source.size_bytes,
                )
            _check_end(source.index, target, source.size_bytes)

    def check(self, segment: Segment) -> None:
        """Raise unless every extent lies on a target disk."""
        extents = segment.extents
        for index in np.unique(extents.disks).tolist():
            disk = self.disks.get(index)
            if disk is None:
                raise TargetMissing(
                    f"Segment {segment.header.position.short} writes to disk {index}, which has no target disk.",
                    remedy="Define the standby again: 'cdp standby define'.",
                    disk=index,
                )
            mine = extents.disks == index
            _check_end(index, disk, int((extents.offsets[mine] + extents.lengths[mine]).max()))

    def apply(self, segment: Segment) -> None:
        """Write all of it. Not durable before ``flush``. Raises ``TargetTooSmall``, ``TargetFailed``."""
        self.check(segment)
        try:
            for disk, offset, length, _ in Runs.of(segment.extents, Kind.ZERO).rows():
                self.disks[disk].zero(offset, length)
            for disk, offset, length, _ in Runs.of(segment.extents, Kind.DISCARD).rows():
                self.disks[disk].discard(offset, length)
            self._write_data(segment)
        except OSError as error:
            raise target_failed(error) from error

    def apply_image(self, segment: Segment, disk: int, offset: int, length: int) -> None:
        """Make ``[offset, offset + length)`` of ``disk`` what the segment holds, zeros where it holds nothing."""
        self.apply(segment)
        at = offset
        end = offset + length
        try:
            for _, run_offset, run_length, _ in Runs.of(segment.extents, Kind.DATA).rows():
                if run_offset > at:
                    self.disks[disk].discard(at, run_offset - at)
                at = run_offset + run_length
            if end > at:
                self.disks[disk].discard(at, end - at)
        except OSError as error:
            raise target_failed(error) from error

    def flush(self) -> None:
        """Raises ``FlushFailed``: what was written since the last flush may be gone then."""
        try:
            for disk in self.disks.values():
                disk.flush()
        except OSError as error:
            raise FlushFailed(
                f"A target disk could not be flushed: {error}.",
                remedy="Check the storage of the hypervisor; the standby compares its disks again by itself.",
                errno=error.errno,
            ) from error

    def _write_data(self, segment: Segment) -> None:
        runs = Runs.of(segment.extents, Kind.DATA).rows()
        frames = segment.frames()
        run = next(runs, None)
        for window_start in range(0, segment.header.payload_bytes, _WINDOW_BYTES):
            window_end = min(window_start + _WINDOW_BYTES, segment.header.payload_bytes)
            for at in range(0, window_end - window_start, FRAME_BYTES):
                frame = next(frames)
                self._window[at : at + len(frame)] = frame
            writes: dict[int, list[tuple[int, memoryview]]] = {}
            while run is not None:
                disk, offset, length, source = run
                take = min(length, window_end - source)
                at = source - window_start
                writes.setdefault(disk, []).append((offset, self._window[at : at + take]))
                if take < length:  # the rest of the run lies in the next window
                    run = (disk, offset + take, length - take, source + take)
                    break
                run = next(runs, None)
                if run is not None and run[3] >= window_end:
                    break
            for disk, batch in writes.items():
                self.disks[disk].write(batch)


def target_failed(error: OSError) -> TargetFailed:
    return TargetFailed(
        f"A target disk failed: {error}.",
        remedy="Check the storage of the hypervisor; the standby goes on by itself once the disk works again.",
        errno=error.errno,
    )


def _check_end(index: int, disk: Disk, needed_bytes: int) -> None:
    size_bytes = disk.size_bytes
    if size_bytes < needed_bytes:
        raise TargetTooSmall(
            f"Target disk {index} has {size_bytes} bytes but needs {needed_bytes}.",
            remedy=f"Grow the target disk to at least {needed_bytes} bytes; replay then goes on by itself.",
            disk=index,
            size_bytes=size_bytes,
            needed_bytes=needed_bytes,
        )
