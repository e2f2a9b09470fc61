"""A directory of things that are expensive to make, under names that say what they were made from."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def default_cache_dir() -> Path:
    """$CDP_CACHE_DIR, or ~/.cache/cdp-standby."""
    return Path(os.environ.get("CDP_CACHE_DIR") or Path.home() / ".cache" / "cdp-standby")


@contextmanager
def complete(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes ``path`` when the block ends well."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Only one process at a time builds into ``directory``; others wait."""
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def forget_old(directory: Path, pattern: str, keep: int) -> None:
    """Delete all but the ``keep`` files that were used last (``used`` says when that was)."""
    for path in sorted(directory.glob(pattern), key=lambda path: path.stat().st_mtime, reverse=True)[keep:]:
        path.unlink()


def used(path: Path) -> Path:
    """Mark ``path`` as used now."""
    os.utime(path)
    return path
