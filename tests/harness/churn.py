"""A seeded load on raw block devices, and the exact state of the disks after any number of its operations.

    python churn.py SEED OPS_PER_S MODE NOTES DEVICE...      until it is ended; OPS_PER_S 0: as fast as it goes

``mixed``: writes of all sizes, write-zeroes and discards at random places; ``sweep``: rewrites each device from end to
end, again and again. One operation at a time, so an image of any crash-consistent moment equals the disks after the
operations that had ended by then, but for the one under way. Runs on the standard library alone: it starts at once.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import random
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BLKDISCARD = 0x1277
BLKZEROOUT = 0x127F
SECTOR_BYTES = 512
POOL_BYTES = 8 << 20
WRITE_SIZES = (512, 1024, 4096, 4096, 4096, 8192, 8192, 12288, 16384, 65536, 131072, 1 << 20)
SWEEP_BYTES = 256 << 10
NOTE = struct.Struct("<QQ")
"""Monotonic ns before and after an operation, one per operation in order."""


@dataclass(frozen=True, slots=True)
class Operation:
    """``payload`` is valid until the next operation is asked for; None unless ``kind`` is ``write``."""

    number: int
    disk: int
    kind: str
    offset: int
    length: int
    payload: memoryview | None


def operations(seed: int, mode: str, sizes: list[int]) -> Iterator[Operation]:
    """The load as a function of its seed, without end."""
    rng = random.Random(seed)
    pool = mmap.mmap(-1, POOL_BYTES)
    # A half of it compresses, as real data does.
    pool[:] = b"".join(rng.randbytes(2048) + bytes(2048) for _ in range(POOL_BYTES // 4096))
    view = memoryview(pool)
    swept = [0] * len(sizes)
    number = 0
    while True:
        disk = rng.randrange(len(sizes))
        if mode == "sweep":
            kind, offset, length = "write", swept[disk], min(SWEEP_BYTES, sizes[disk] - swept[disk])
            swept[disk] = (offset + length) % sizes[disk]
        else:
            kind = rng.choices(("write", "zero", "discard", "flush"), (92, 3, 2, 3))[0]
            length = rng.choice(WRITE_SIZES)
            # Hot blocks are rewritten within a second, the rest of the disk is touched now and then.
            span = sizes[disk] // 16 if rng.random() < 0.7 else sizes[disk]
            offset = rng.randrange((span - length) // SECTOR_BYTES + 1) * SECTOR_BYTES
        payload = None
        if kind == "write":
            at = rng.randrange((POOL_BYTES - length) // SECTOR_BYTES + 1) * SECTOR_BYTES
            payload = view[at : at + length]
            payload[:16] = struct.pack("<QQ", number, offset)
        yield Operation(number, disk, kind, offset, length, payload)
        number += 1


def main(seed: int, ops_per_s: float, mode: str, notes: Path, devices: list[Path]) -> None:
    fds = [os.open(path, os.O_RDWR | os.O_DIRECT) for path in devices]
    started = time.monotonic()
    with notes.open("wb", buffering=0) as out:
        for operation in operations(seed, mode, [os.lseek(fd, 0, os.SEEK_END) for fd in fds]):
            fd, began = fds[operation.disk], time.monotonic_ns()
            if operation.payload is not None:
                assert os.pwritev(fd, [operation.payload], operation.offset) == operation.length
            elif operation.kind == "flush":
                os.fsync(fd)
            else:
                request = BLKZEROOUT if operation.kind == "zero" else BLKDISCARD
                fcntl.ioctl(fd, request, struct.pack("<QQ", operation.offset, operation.length))
            out.write(NOTE.pack(began, time.monotonic_ns()))
            if ops_per_s:
                # The pace is what this program is for.
                time.sleep(max(0.0, started + operation.number / ops_per_s - time.monotonic()))


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), [Path(name) for name in sys.argv[5:]])
