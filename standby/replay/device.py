"""A target disk: a block device opened with O_DIRECT.

    sector_bytes 512    every extent fits the grid: written as it comes, a few writes at a time
    sector_bytes 4096   an extent may start or end inside a sector: read, modify, write, one at a time, because two
                        extents may share a sector

Page caches are bypassed: whoever mounts the disk afterwards must drop the caches of the disk and of its partitions.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from journal.extent import SECTOR_BYTES

_BLKZEROOUT: Final = 0x127F
_BLKSSZGET: Final = 0x1268
_FALLOC_FL_KEEP_SIZE: Final = 1
_FALLOC_FL_PUNCH_HOLE: Final = 2
_UNSUPPORTED: Final = frozenset({errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS})

_PARALLEL_WRITES: Final = 4
"""Writes in flight: enough to hide the latency of a virtual disk; each costs a thread."""
_BLOCK_BYTES: Final = 4 << 20
"""Largest single read, and the size of the bounce buffer of a 4096-byte-sector disk (less one sector at each end)."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class BlockDisk:
    """``ports.Disk`` over a block device. Its methods block; one caller at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        raw = fcntl.ioctl(self._fd, _BLKSSZGET, bytes(4))
        self.sector_bytes: int = struct.unpack("=i", raw)[0]
        self._punch = True
        self._bounce: mmap.mmap | None = None
        self._pool = ThreadPoolExecutor(_PARALLEL_WRITES, thread_name_prefix=f"write-{path.name}")

    def close(self) -> None:
        self._pool.shutdown()
        os.close(self._fd)

    @property
    def size_bytes(self) -> int:
        # Asked each time: the hypervisor may grow the disk while we follow.
        return os.lseek(self._fd, 0, os.SEEK_END)

    def write(self, writes: Sequence[tuple[int, memoryview]]) -> None:
        if self.sector_bytes > SECTOR_BYTES:
            for offset, data in writes:
                self._write_unaligned(offset, data)
        elif len(writes) < _PARALLEL_WRITES:
            self._write_all(writes)
        else:
            step = -(-len(writes) // _PARALLEL_WRITES)
            parts = [writes[start : start + step] for start in range(0, len(writes), step)]
            # list() re-raises the first failure, after all parts have ended.
            list(self._pool.map(self._write_all, parts))

    def zero(self, offset: int, length: int) -> None:
        for start, end in self._whole_sectors(offset, length):
            fcntl.ioctl(self._fd, _BLKZEROOUT, struct.pack("=QQ", start, end - start))

    def discard(self, offset: int, length: int) -> None:
        """BLKDISCARD promises nothing about what is read afterwards; punching a hole into a block device does."""
        if self._punch:
            try:
                for start, end in self._whole_sectors(offset, length):
                    self._punch_hole(start, end - start)
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
                self._punch = False
            else:
                return
        self.zero(offset, length)

    def read(self, offset: int, length: int) -> memoryview:
        """``length`` bytes; fewer only beyond the end of the disk."""
        start = offset // self.sector_bytes * self.sector_bytes
        end = -(-(offset + length) // self.sector_bytes) * self.sector_bytes
        buffer = memoryview(mmap.mmap(-1, end - start))
        at = 0
        while at < len(buffer):
            got = os.preadv(self._fd, [buffer[at : at + _BLOCK_BYTES]], start + at)
            if got == 0:
                break
            at += got
        return buffer[offset - start : min(offset - start + length, at)]

    def flush(self) -> None:
        os.fdatasync(self._fd)

    def _write_all(self, writes: Sequence[tuple[int, memoryview]]) -> None:
        for offset, data in writes:
            at = 0
            while at < len(data):
                at += os.pwrite(self._fd, data[at:] if at else data, offset + at)

    def _write_unaligned(self, offset: int, data: memoryview) -> None:
        """Through a bounce buffer that covers whole sectors; the edges are read first."""
        if self._bounce is None:
            self._bounce = mmap.mmap(-1, _BLOCK_BYTES)
        buffer = memoryview(self._bounce)
        sector = self.sector_bytes
        at = 0
        while at < len(data):
            start = (offset + at) // sector * sector
            lead = offset + at - start
            take = min(len(data) - at, _BLOCK_BYTES - 2 * sector)
            end = -(-(start + lead + take) // sector) * sector
            if lead:
                buffer[:sector] = self.read(start, sector)
            if (lead + take) % sector and (end - start > sector or not lead):
                buffer[end - start - sector : end - start] = self.read(end - sector, sector)
            buffer[lead : lead + take] = data[at : at + take]
            self._write_all([(start, buffer[: end - start])])
            at += take

    def _whole_sectors(self, offset: int, length: int) -> list[tuple[int, int]]:
        """The half-open range of whole sectors inside the range, if any; zeros are written to what is around it."""
        sector = self.sector_bytes
        start = min(-(-offset // sector) * sector, offset + length)
        end = max((offset + length) // sector * sector, start)
        for edge_start, edge_end in ((offset, start), (end, offset + length)):
            if edge_end > edge_start:
                self._write_unaligned(edge_start, memoryview(bytes(edge_end - edge_start)))
        return [(start, end)] if end > start else []

    def _punch_hole(self, offset: int, length: int) -> None:
        mode = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
        if _libc.fallocate(self._fd, mode, offset, length) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(self.path))
