"""Loop devices on sparse files: the disks of the native plant."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from tests.harness.process import run

MEMORY_FREE_BYTES_MIN = 6 << 30
"""Disks lie in memory only where enough of it is left for everything else."""


def scratch_dir(prefix: str) -> Path:
    """A fresh directory for disk images, in memory if there is plenty. The caller removes it."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > MEMORY_FREE_BYTES_MIN
    directory = Path(tempfile.mkdtemp(prefix=prefix, dir=memory if roomy else None))
    # PostgreSQL runs as a user of its own and must get to its mount point.
    directory.chmod(0o755)
    return directory


class LoopDisk:
    """A file of ``size_bytes`` zeros as a block device. ``device`` is its path; ``close`` detaches it."""

    def __init__(
        self, backing: Path, size_bytes: int | None, *, sector_bytes: int = 512, spend_zeroing: bool = True
    ) -> None:
        """``size_bytes`` None: the file exists (a recovered image). ``spend_zeroing``: see below."""
        self.backing = backing
        if size_bytes is not None:
            with backing.open("xb") as file:
                file.truncate(size_bytes)
        self.size_bytes = backing.stat().st_size
        options = ["--sector-size", str(sector_bytes)] if sector_bytes != 512 else []
        self.device = Path(run(["losetup", "--find", "--show", *options, str(backing)]).strip())
        self._open = True
        if size_bytes is not None and spend_zeroing:
            # The first write-zeroes tells the driver whether the file below can do it. On tmpfs it fails, once, and by
            # right counts as a lost write: not in the middle of a proof that nothing is lost.
            run(["blkdiscard", "--zeroout", "--length", "4096", str(self.device)])

    def close(self) -> None:
        if self._open:
            self._open = False
            run(["losetup", "--detach", str(self.device)])

    def come_back(self) -> None:
        """After ``close``: the same content under the same name, as far as the kernel is concerned another disk."""
        run(["losetup", str(self.device), str(self.backing)])
        self._open = True

    def detached(self) -> bool:
        """Detaching waits for the last user: true once nobody holds the device."""
        backing = Path(f"/sys/block/{self.device.name}/loop/backing_file")
        return not backing.exists()


def drop_caches(device: Path) -> None:
    """Write back and forget the page cache of a block device, so that the next read shows the disk itself."""
    fd = os.open(device, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    run(["blockdev", "--flushbufs", str(device)])
