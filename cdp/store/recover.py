"""A disk at a recovery point, written to a file: sparse, every frame checked before it is written, synced, renamed.

The file gets its name only when it is complete; until then it is ``.NAME.recovering`` beside it.
"""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal

from cdp.imagefile import Fill, ImageFile
from cdp.store.errors import RecoverFailed
from cdp.store.files import OsFiles, opened
from cdp.store.image import ImageReader
from cdp.store.store import Store
from journal.errors import NoRecoveryPoint
from journal.position import Position

Progress = Callable[[int, int], None]
"""Called with the bytes of the disk done and in all."""
THREADS: Final = 3
"""Decompressing and writing let go of the interpreter's lock; some wait for the disk, or for each other at the file."""


def recover(  # noqa: PLR0917 (the first five say what goes where)
    store: Store,
    machine: uuid.UUID,
    disk: int,
    position: Position,
    out_path: Path | str,
    format: Literal["raw", "qcow2"] = "raw",  # noqa: A002 (the word that people use)
    progress: Progress | None = None,
) -> None:
    """Write ``disk`` as it was at ``position`` to ``out_path``, which is replaced if it exists.

    Raises ``NoRecoveryPoint`` for a position inside a second or a fuzzy interval, ``UnknownPosition``,
    ``UnknownDisk``, ``StoredDamage``, and ``RecoverFailed`` if the file cannot be written.
    """
    if not store.is_recovery_point(machine, position):
        raise NoRecoveryPoint(
            f"Position {position.short} is not a recovery point.",
            remedy="Choose one of those that 'cdp points' lists.",
            machine=str(machine),
            position=str(position),
        )
    out_path = Path(out_path)
    raw = out_path.with_name(f".{out_path.name}.recovering")
    converted = out_path.with_name(f".{out_path.name}.converting")
    try:
        with ImageReader(store, machine, position) as image:
            _write_raw(image, disk, raw, progress)
        if format == "qcow2":
            _convert(raw, converted)
            OsFiles().replace(converted, out_path)
        else:
            OsFiles().replace(raw, out_path)
    except OSError as error:
        raise RecoverFailed(
            f"{out_path} cannot be written: {error.strerror or error}.",
            remedy="Check the free space and the permissions of the directory, or name another file.",
            path=str(out_path),
        ) from error
    finally:
        for path in (raw, converted):
            path.unlink(missing_ok=True)


class _Disk:
    """As ``ImageFile`` wants it."""

    def __init__(self, image: ImageReader, disk: int) -> None:
        self._image = image
        self._disk = disk

    def size_bytes(self) -> int:
        return self._image.disk(self._disk).size_bytes

    def extents(self) -> Iterator[tuple[int, int, bool]]:
        return self._image.walk_extents(self._disk, 0, self.size_bytes())

    @contextmanager
    def filling(self) -> Iterator[Fill]:
        yield lambda offset, into: self._image.read_into(self._disk, offset, into)


def _write_raw(image: ImageReader, disk: int, path: Path, progress: Progress | None) -> None:
    source = _Disk(image, disk)
    total, done = source.size_bytes(), 0
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)

    def advance(disk_bytes: int) -> None:
        nonlocal done
        done += disk_bytes
        if progress is not None:
            progress(done, total)

    advance(0)
    ImageFile(source, path, advance, threads=THREADS).write(check=False)


def _convert(raw: Path, out: Path) -> None:
    command = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-S", "4k", "--", str(raw), str(out)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise RecoverFailed(
            "qcow2 files are made by 'qemu-img', which is not installed.",
            remedy="Install the package qemu-utils, or recover to a raw file.",
        ) from error
    if done.returncode != 0:
        raise RecoverFailed(
            f"qemu-img could not write {out}: {done.stderr.strip()}.",
            remedy="Check the free space of the directory, or recover to a raw file.",
        )
    with opened(OsFiles(), out, write=True) as handle:
        os.fsync(handle)
