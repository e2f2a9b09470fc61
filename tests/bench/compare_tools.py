"""restic and borg beside our store: the same full copy, the same change set, the same restore. Keys: ``compare_…``.

The disk holds files of this host; the change set is one minute of writes. Each tool keeps what it needs to give back
the disk as it was after each step; ours keeps every second in between. For each: seconds of the full copy, of taking in
the changes and of giving back the changed disk, and MB (10^6 bytes) that its directory takes after each.

They do not do the same: restic encrypts, borg does not here; both read the whole disk again to find what changed, which
our agent has captured already and hands over; ours is synced to the disk every second. The figures are raw.
"""

from __future__ import annotations

import filecmp
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from cdp.store import Store, recover
from tests.harness.realdata import Stored, apply, change, write_base

DISK_BYTES = 512 << 20
SECONDS = 60
BLOCKS_A_SECOND = 100

Changes = list[list[tuple[int, bytes]]]


class Tool(Protocol):
    directory: Path

    def full(self, source: Path) -> None: ...

    def changed(self, source: Path, changes: Changes) -> None: ...

    def restore(self, out: Path) -> None: ...


class Ours:
    def __init__(self, work: Path) -> None:
        self.directory = work / "ours"
        # Small files: they are preallocated, and what is empty in the last one counts here.
        self._store = Store.open(self.directory, file_bytes=16 << 20)
        self._stored = Stored(self._store, "db1", DISK_BYTES, time.time_ns() - 3600 * 10**9)

    def full(self, source: Path) -> None:
        self._stored.seed(source)

    def changed(self, source: Path, changes: Changes) -> None:
        for second in changes:
            self._stored.second(second)

    def restore(self, out: Path) -> None:
        recover(self._store, self._stored.machine, 0, self._store.live(self._stored.machine), out)

    def close(self) -> None:
        self._store.close()


class Restic:
    def __init__(self, work: Path) -> None:
        self.directory = work / "restic"
        self._cache = work / "restic-cache"
        self._run("init")

    def full(self, source: Path) -> None:
        self._run("backup", str(source))

    def changed(self, source: Path, changes: Changes) -> None:
        self._run("backup", str(source))

    def restore(self, out: Path) -> None:
        self._run("restore", "latest", "--target", str(out.parent / "restic-out"))
        next((out.parent / "restic-out").rglob("*.raw")).rename(out)
        shutil.rmtree(out.parent / "restic-out")

    def _run(self, *words: str) -> None:
        options = ["--repo", str(self.directory), "--cache-dir", str(self._cache), "--quiet"]
        _run(["restic", *options, *words], {"RESTIC_PASSWORD": "benchmark"})


class Borg:
    def __init__(self, work: Path) -> None:
        self.directory = work / "borg"
        self._home = work / "borg-home"
        self._run("init", "--encryption", "none", str(self.directory))

    def full(self, source: Path) -> None:
        self._run("create", f"{self.directory}::full", source.name, cwd=source.parent)

    def changed(self, source: Path, changes: Changes) -> None:
        self._run("create", f"{self.directory}::changed", source.name, cwd=source.parent)

    def restore(self, out: Path) -> None:
        into = out.parent / "borg-out"
        into.mkdir()
        self._run("extract", f"{self.directory}::changed", cwd=into)
        next(into.glob("*.raw")).rename(out)
        into.rmdir()

    def _run(self, *words: str, cwd: Path | None = None) -> None:
        _run(["borg", *words], {"BORG_BASE_DIR": str(self._home)}, cwd)


def measure() -> dict[str, float]:
    work = Path(tempfile.mkdtemp(prefix="cdp-bench-compare-", dir="/var/tmp"))
    try:
        return _measure(work)
    finally:
        shutil.rmtree(work)


def _measure(work: Path) -> dict[str, float]:
    source = work / "source.raw"
    write_base(source, DISK_BYTES)
    ours = Ours(work)
    tools: dict[str, Tool] = {"ours": ours, "restic": Restic(work), "borg": Borg(work)}
    figures: dict[str, float] = {}
    for name, tool in tools.items():
        figures[f"compare_{name}_full_s"] = _timed(lambda: tool.full(source))  # noqa: B023
        figures[f"compare_{name}_full_mb"] = _used_mb(tool.directory)
    changes = [change(source, second, BLOCKS_A_SECOND) for second in range(SECONDS)]
    for second in changes:
        apply(source, second)
    for name, tool in tools.items():
        figures[f"compare_{name}_change_s"] = _timed(lambda: tool.changed(source, changes))  # noqa: B023
        figures[f"compare_{name}_change_mb"] = round(_used_mb(tool.directory) - figures[f"compare_{name}_full_mb"], 1)
    out = work / "restored"
    for name, tool in tools.items():
        figures[f"compare_{name}_restore_s"] = _timed(lambda: tool.restore(out))  # noqa: B023
        assert filecmp.cmp(source, out, shallow=False), name
        out.unlink()
    ours.close()
    for name in tools:
        row = "  ".join(
            f"{key.removeprefix(f'compare_{name}_')} {value}" for key, value in figures.items() if f"_{name}_" in key
        )
        print(f"{name:7} {row}", flush=True)
    return figures


def _timed(work: Callable[[], None]) -> float:
    """With everything on the disk at the end."""
    os.sync()
    began_s = time.monotonic()
    work()
    os.sync()
    return round(time.monotonic() - began_s, 2)


def _used_mb(directory: Path) -> float:
    """Disk blocks of all its files."""
    return round(sum(path.stat().st_blocks * 512 for path in directory.rglob("*") if path.is_file()) / 1e6, 1)


def _run(words: list[str], env: dict[str, str], cwd: Path | None = None) -> None:
    subprocess.run(words, check=True, capture_output=True, env={**os.environ, **env}, cwd=cwd)
