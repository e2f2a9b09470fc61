"""A disk at a recovery point, written to a file: sparse, every frame checked before it is written, synced, renamed.

The file gets its name only when it is complete; until then it is ``.NAME.recovering`` beside it.
"""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Literal

from cdp.store.errors import NoRecoveryPoint, RecoverFailed
from cdp.store.files import OsFiles, opened
from cdp.store.image import ImageReader
from cdp.store.store import Store
from journal.position import Position

Progress = Callable[[int, int], None]
"""Called with the bytes of data done and the bytes of data in all."""
_BATCH_BYTES: Final = 32 << 20


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


def _write_raw(image: ImageReader, disk: int, path: Path, progress: Progress | None) -> None:
    size_bytes = image.disk(disk).size_bytes
    path.unlink(missing_ok=True)
    files = OsFiles()
    files.create_sparse(path, size_bytes)
    total = sum(size for _, size in image.data_extents(disk))
    done = 0
    if progress is not None:
        progress(0, total)
    with opened(files, path, write=True) as handle:
        for parts in _batches(image.data_extents(disk)):
            start = parts[0][0]
            data = memoryview(image.read(disk, start, parts[-1][0] + parts[-1][1] - start))
            for at, size in parts:
                files.write(handle, [data[at - start : at - start + size]], at)
                done += size
            if progress is not None:
                progress(done, total)
        os.fsync(handle)


def _batches(extents: Iterator[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Ascending extents, cut and grouped so that a group spans ``_BATCH_BYTES`` at most."""
    batch: list[tuple[int, int]] = []
    for start, size in extents:
        while size:
            room = _BATCH_BYTES - (start - batch[0][0]) if batch else _BATCH_BYTES
            if room <= 0:
                yield batch
                batch = []
                continue
            take = min(room, size)
            batch.append((start, take))
            start, size = start + take, size - take  # noqa: PLW2901
    if batch:
        yield batch


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
