"""Write initramfs archives ("newc" cpio) that depend on nothing but their content: fixed times, owners and order."""

from __future__ import annotations

import stat
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

_MAGIC = b"070701"
_ALIGNMENT_BYTES = 4


class CpioWriter:
    """Appends entries to ``out``; parents are created on the way, the trailer is written on a clean exit.

    Paths are relative, without a leading slash. Two entries of one path are refused: the kernel would silently let the
    later one win.
    """

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._inode = 0
        self._paths: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self._entry("TRAILER!!!", 0, b"", inode=0)

    def __contains__(self, path: str) -> bool:
        return path in self._paths

    def directory(self, path: str, mode: int = 0o755) -> None:
        """Create ``path`` and its parents unless this archive has them already."""
        if path in {"", "."} or path in self._paths:
            return
        self._parents(path)
        self._add(path, stat.S_IFDIR | mode, b"")

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        self._parents(path)
        self._add(path, stat.S_IFREG | mode, data)

    def symlink(self, path: str, target: str) -> None:
        self._parents(path)
        self._add(path, stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, path: str, major: int, minor: int, mode: int = 0o600) -> None:
        self._parents(path)
        self._add(path, stat.S_IFCHR | mode, b"", device=(major, minor))

    def _parents(self, path: str) -> None:
        if path.startswith("/") or ".." in path.split("/"):
            raise ValueError(f"not a path inside an archive: {path!r}")
        parent = str(Path(path).parent)
        if parent != ".":
            self.directory(parent)

    def _add(self, path: str, mode: int, data: bytes, device: tuple[int, int] = (0, 0)) -> None:
        if path in self._paths:
            raise ValueError(f"twice in one archive: {path!r}")
        self._paths.add(path)
        self._inode += 1
        self._entry(path, mode, data, inode=self._inode, device=device)

    def _entry(self, path: str, mode: int, data: bytes, *, inode: int, device: tuple[int, int] = (0, 0)) -> None:
        name = path.encode() + b"\0"
        links = 2 if stat.S_ISDIR(mode) else 1
        numbers = (inode, mode, 0, 0, links, 0, len(data), 0, 0, device[0], device[1], len(name), 0)
        header = _MAGIC + b"".join(b"%08X" % number for number in numbers)
        self._out.write(header + name + _padding(len(header) + len(name)))
        self._out.write(data + _padding(len(data)))


def _padding(length: int) -> bytes:
    return bytes(-length % _ALIGNMENT_BYTES)
