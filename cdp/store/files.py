"""The file operations that durability depends on, behind one small interface, so that tests can break them.

Everything that the store writes apart from the LMDB index goes through ``Files``. A fault-injecting implementation
loses what was not synced, tears writes and crashes between any two calls (``tests/store/faulty.py``).
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Protocol

Buffer = bytes | bytearray | memoryview

_KEEP_SIZE: Final = 1
_PUNCH_HOLE: Final = 2
_SYNC_FILE_RANGE_WRITE: Final = 2
_IOV_MAX: Final = 1024
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


class Files(Protocol):
    """Handles are small integers. Every method raises ``OSError``."""

    def create(self, path: Path, size_bytes: int) -> None:
        """A new file of allocated blocks that read as zeros; durable with its name. Leaves nothing if it fails."""

    def create_sparse(self, path: Path, size_bytes: int) -> None:
        """A new file that is one hole; durable with its name. An existing one is resized."""

    def open(self, path: Path, *, write: bool = False) -> int: ...

    def close(self, handle: int) -> None: ...

    def write(self, handle: int, buffers: Sequence[Buffer], offset: int) -> None:
        """All of ``buffers``, one after another, from ``offset`` on. Durable only after ``sync``."""

    def read(self, handle: int, length: int, offset: int) -> bytes:
        """``length`` bytes, fewer only at the end of the file."""

    def punch(self, handle: int, length: int, offset: int) -> None:
        """Turn the range into a hole. Durable only after ``sync``."""

    def start(self, handle: int, length: int, offset: int) -> None:
        """Begin to bring the range to the disk, so that ``sync`` has less to wait for. No promise."""

    def sync(self, handle: int) -> None:
        """Everything written to ``handle`` so far is durable on return."""

    def replace(self, source: Path, target: Path) -> None:
        """Rename over ``target``; durable on return."""

    def unlink(self, path: Path) -> None:
        """Remove the name if it is there; durable at some later time."""

    def room(self, path: Path) -> tuple[int, int]:
        """Bytes that are free, and all bytes, of the filesystem that holds ``path``."""


@contextmanager
def opened(files: Files, path: Path, *, write: bool = False) -> Iterator[int]:
    handle = files.open(path, write=write)
    try:
        yield handle
    finally:
        files.close(handle)


class OsFiles:
    """The real thing."""

    def create(self, path: Path, size_bytes: int) -> None:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(handle, 0, size_bytes)
            os.fsync(handle)
        except BaseException:
            path.unlink()
            raise
        finally:
            os.close(handle)
        sync_directory(path.parent)

    def create_sparse(self, path: Path, size_bytes: int) -> None:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(handle, size_bytes)
            os.fsync(handle)
        finally:
            os.close(handle)
        sync_directory(path.parent)

    def open(self, path: Path, *, write: bool = False) -> int:
        return os.open(path, (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC)

    def close(self, handle: int) -> None:
        os.close(handle)

    def write(self, handle: int, buffers: Sequence[Buffer], offset: int) -> None:
        left = [memoryview(buffer).cast("B") for buffer in buffers if len(buffer)]
        while left:
            written = os.pwritev(handle, left[:_IOV_MAX], offset)
            offset += written
            while left and written >= len(left[0]):
                written -= len(left.pop(0))
            if written:
                left[0] = left[0][written:]

    def read(self, handle: int, length: int, offset: int) -> bytes:
        first = os.pread(handle, length, offset)
        if len(first) == length or not first:
            return first
        parts = [first]
        got = len(first)
        while got < length and (part := os.pread(handle, length - got, offset + got)):
            parts.append(part)
            got += len(part)
        return b"".join(parts)

    def punch(self, handle: int, length: int, offset: int) -> None:
        if not _fallocate(handle, _KEEP_SIZE | _PUNCH_HOLE, offset, length):
            # No holes on this filesystem: zeros mean the same.
            self.write(handle, [bytes(length)], offset)

    def start(self, handle: int, length: int, offset: int) -> None:
        _libc.sync_file_range(handle, offset, length, _SYNC_FILE_RANGE_WRITE)

    def sync(self, handle: int) -> None:
        os.fdatasync(handle)

    def replace(self, source: Path, target: Path) -> None:
        source.replace(target)
        sync_directory(target.parent)

    def unlink(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def room(self, path: Path) -> tuple[int, int]:
        found = os.statvfs(path)
        return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize


def sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_tree(directory: Path) -> None:
    """Remove a directory with all that is in it, if it is there."""
    if directory.is_dir():
        shutil.rmtree(directory)


def reserve_blocks(path: Path, size_bytes: int) -> None:
    """Allocate the blocks of ``path`` up to ``size_bytes`` without changing its length. Raises ``OSError`` (ENOSPC);
    does nothing on filesystems that cannot do it."""
    handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        if os.fstat(handle).st_blocks * 512 < size_bytes:
            _fallocate(handle, _KEEP_SIZE, 0, size_bytes)
    finally:
        os.close(handle)


def _fallocate(handle: int, mode: int, offset: int, length: int) -> bool:
    """False if the filesystem cannot do it."""
    while _libc.fallocate(handle, mode, offset, length) != 0:
        number = ctypes.get_errno()
        if number in (errno.EOPNOTSUPP, errno.ENOSYS):
            return False
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
    return True
