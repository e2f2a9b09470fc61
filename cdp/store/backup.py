"""The store's catalogue: checked, copied while the server runs, and put back.

    backup     the index as of one moment (LMDB's own copy), certificate authority, operator's credential, configuration
    restore    the index again, on top of the segment files as they are now (``adopt``)

Segments and base images are not copied: they are large, and each carries what is needed to find it again. A backup is
complete or has no name: it is made beside its place and renamed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from pathlib import Path
from typing import Any, Final

import lmdb
import msgspec

from cdp.store.adopt import Adopted, adopt
from cdp.store.check import check_index
from cdp.store.core import MAP_BYTES
from cdp.store.errors import StoreLocked
from cdp.store.files import OsFiles, sync_directory
from cdp.store.index import FORMAT, TABLES, Reader
from cdp.store.records import Base, Machine, SegmentFile, Tail
from journal.errors import CdpError

STORE: Final = "store"
STATE: Final = ("tls", "operator.json")
"""What the server keeps beside the store, and cannot make anew: its authority's key, its first operator."""
CONFIG: Final = "server.toml"
MANIFEST: Final = "manifest.json"


class BackupFailed(CdpError):
    """The catalogue could not be copied, or a copy cannot be used. Nothing was changed."""

    code = "backup-failed"


class StoreUnsound(CdpError):
    """A check of the store found something."""

    code = "store-unsound"


class Manifest(msgspec.Struct, kw_only=True):
    """``tips``: what the index knew of each machine, by name."""

    format: str
    made_at_s: float
    rows: int
    machines: list[str]


class Checked(msgspec.Struct, kw_only=True):
    """``problems``: sentences. ``segment_files`` and ``spare_files``: of the machines, and kept for reuse."""

    rows: int
    machines: int
    segment_files: int
    spare_files: int
    problems: list[str]


def check(directory: Path) -> Checked:
    """Index, files and heads of ``directory`` (the server's), also while the server runs. Reads no payload: see
    ``verify`` for that. Raises ``CheckFailed``."""
    store = directory / STORE
    index = check_index(store / "index")
    found = Checked(rows=index.rows, machines=0, segment_files=0, spare_files=0, problems=list(index.problems))
    if found.problems:
        return found  # what it says of the files cannot be trusted
    with (
        lmdb.open(str(store / "index"), readonly=True, max_dbs=len(TABLES), readahead=False) as environment,
        environment.begin() as txn,
    ):
        reader = Reader(txn, _tables(environment, txn))
        _check_files(reader, store, found)
        _check_machines(reader, store, found)
    for name in STATE:
        if not (directory / name).exists():
            found.problems.append(f"{directory / name} is missing: restore it from a backup.")
    return found


def backup(directory: Path, target: Path, config: Path | None) -> Manifest:
    """A copy of the catalogue in ``target``, which must not exist. Raises ``BackupFailed``."""
    if target.exists():
        raise BackupFailed(f"{target} exists.", remedy="Name a directory that does not exist yet.", path=str(target))
    partial = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "index").mkdir(mode=0o700, parents=True)
        partial.chmod(0o700)
        with lmdb.open(
            str(directory / STORE / "index"), readonly=True, create=False, max_dbs=len(TABLES), readahead=False
        ) as environment:
            environment.copy(str(partial / "index"), compact=True)
        for name in STATE:
            _copy(directory / name, partial / name)
        if config is not None and config.exists():
            _copy(config, partial / CONFIG)
        manifest = _manifest(partial / "index")
        (partial / MANIFEST).write_bytes(msgspec.json.encode(manifest))
        _sync_tree(partial)
        partial.rename(target)
        sync_directory(target.parent)
    except (OSError, lmdb.Error) as error:
        raise BackupFailed(
            f"The catalogue cannot be copied: {error}.", remedy="Check the paths, their owner, and the free space."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def restore(source: Path, directory: Path, *, map_bytes: int = MAP_BYTES) -> list[Adopted]:
    """Put the catalogue in ``source`` back into ``directory`` (the server's), on top of the segment files there, and
    adopt what they hold beyond it. The index that was there is kept as ``index.before-restore-…``. Standbys compare
    their disks afterwards. Raises ``BackupFailed``, ``StoreLocked``."""
    checked = check_index(source / "index")
    if checked.problems or not checked.rows:
        raise BackupFailed(
            f"{source} is not a sound backup: {''.join(checked.problems[:1]) or 'its index is empty.'}",
            remedy="Use another one.",
        )
    store = directory / STORE
    try:
        store.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(store / "LOCK", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise BackupFailed(
            f"{directory} cannot be used: {error}.", remedy="Run as root, as the server does."
        ) from error
    try:
        _lock(handle, directory)
        new = _staged(source, store)
        adopted = adopt(store, new, OsFiles(), map_bytes)
        _put_in_place(source, directory, new)
        return adopted
    except OSError as error:
        raise BackupFailed(
            f"The catalogue cannot be put back: {error}.", remedy="Check the disk, then repeat the command."
        ) from error
    finally:
        os.close(handle)


def _lock(handle: int, directory: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StoreLocked(
            f"The server of {directory} is running.", remedy="Stop it first: 'systemctl stop cdp-server'."
        ) from None


def _staged(source: Path, store: Path) -> Path:
    """A copy of the index beside its place, to be adopted into before anybody can open it."""
    new = store / "index.new"
    shutil.rmtree(new, ignore_errors=True)
    shutil.copytree(source / "index", new, ignore=shutil.ignore_patterns("lock.mdb"))
    new.chmod(0o700)
    return new


def _put_in_place(source: Path, directory: Path, new: Path) -> None:
    """A crash leaves the old index, none, or the new one; with none the server does not find a store."""
    index = new.with_name("index")
    (new / "lock.mdb").unlink(missing_ok=True)
    _sync_tree(new)
    if index.exists():
        index.rename(index.with_name(f"index.before-restore-{time.time_ns()}"))
    new.rename(index)
    sync_directory(index.parent)
    for name in STATE:
        if not (directory / name).exists():
            _copy(source / name, directory / name)


def _check_files(reader: Reader, store: Path, found: Checked) -> None:
    rows = list(reader.rows("files", b"", SegmentFile))
    for row in rows:
        path = store / "segments" / f"{row.number:08d}.seg"
        if row.machine is None:
            found.spare_files += 1
        else:
            found.segment_files += 1
        if not path.exists():
            found.problems.append(f"Segment file {path.name} is missing.")
        elif path.stat().st_size != row.size_bytes:
            found.problems.append(f"Segment file {path.name} has {path.stat().st_size} bytes, not {row.size_bytes}.")
    known = {row.number: row for row in rows}
    for tail in reader.rows("tails", b"", Tail):
        if tail.file not in known or tail.end > known[tail.file].size_bytes:
            found.problems.append(f"The end of segment file {tail.file} is not where the index says.")


def _check_machines(reader: Reader, store: Path, found: Checked) -> None:
    for machine in reader.rows("machines", b"", Machine):
        found.machines += 1
        base = reader.get_row("bases", machine.uuid.bytes, Base)
        if base is None or base.folded is None:
            continue
        directory = store / "base" / str(machine.uuid) / str(base.root)
        for disk in machine.disks:
            if not (directory / f"{disk.index}.img").exists():
                found.problems.append(f"The base image of disk {disk.index} of {machine.name!r} is missing.")


def _manifest(index: Path) -> Manifest:
    checked = check_index(index)
    if checked.problems:
        raise BackupFailed(
            f"The index is damaged: {checked.problems[0]}",
            remedy="Restore it from an older backup: 'cdp store restore'.",
        )
    with lmdb.open(str(index), readonly=True, max_dbs=len(TABLES)) as environment, environment.begin() as txn:
        names = [row.name for row in Reader(txn, _tables(environment, txn)).rows("machines", b"", Machine)]
    (index / "lock.mdb").unlink(missing_ok=True)
    return Manifest(format=FORMAT.decode(), made_at_s=time.time(), rows=checked.rows, machines=names)


def _tables(environment: Any, txn: Any) -> dict[str, Any]:
    return {name: environment.open_db(name.encode(), txn=txn, create=False) for name in TABLES}


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy2(source, target)


def _sync_tree(directory: Path) -> None:
    for path in sorted(directory.rglob("*")):
        if path.is_dir():
            sync_directory(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_directory(directory)
