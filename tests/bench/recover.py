"""Recovery of a disk to a raw file against ``cp`` of the same content on the same disk. Key: ``recover_ratio``.

The disk holds files of this host, seeded and then changed for some minutes, so that its image is put together from many
segments. A pair is the store's ``recover`` and ``cp`` with an fsync of what it wrote, for that is what a recovery
promises; the order alternates, and the page cache holds the sources of both. Told is the median of the pairs' ratios
of MB/s. ``recover_command_ratio`` is the same for 'cdp recover' as a whole: the start of the command, and HTTPS on
loopback with both its ends on this host's processors.
"""

from __future__ import annotations

import filecmp
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from cdp.store import Store, recover
from tests.harness.longhistory import Unsynced
from tests.harness.realdata import Stored, apply, change, write_base
from tests.harness.site import Site

DISK_BYTES = 1 << 30
SECONDS = 120
BLOCKS_A_SECOND = 100
PAIRS = 5


def measure() -> dict[str, float]:
    directory = Path(tempfile.mkdtemp(prefix="cdp-bench-recover-", dir="/var/tmp"))
    site = Site(directory, "[dedup]\nenabled = false\n")
    try:
        site.initialise()
        source = directory / "source.raw"
        with Store.open(directory / "state/store", fs=Unsynced()) as store:
            stored = _fill(store, source)
            inside = _pairs(lambda out: recover(store, stored.machine, 0, store.live(stored.machine), out), source)
        os.sync()
        site.start()
        outside = _pairs(lambda out: _command(site, out), source)
        return {
            "recover_ratio": round(statistics.median(inside), 2),
            "recover_command_ratio": round(statistics.median(outside), 2),
        }
    finally:
        if site.process is not None:
            site.stop()
        shutil.rmtree(directory)


def _fill(store: Store, source: Path) -> Stored:
    write_base(source, DISK_BYTES)
    stored = Stored(store, "db1", DISK_BYTES, time.time_ns() - 3600 * 10**9)
    stored.seed(source)
    for second in range(SECONDS):
        changes = change(source, second, BLOCKS_A_SECOND)
        apply(source, changes)
        stored.second(changes)
    return stored


def _command(site: Site, out: Path) -> None:
    site.cdp("recover", "db1", "-o", str(out))


def _pairs(ours: Callable[[Path], None], source: Path) -> list[float]:
    ratios = []
    for turn in range(PAIRS):
        sides: dict[str, Callable[[Path], None]] = {"ours": ours, "cp": _cp(source)}
        seconds = {name: _timed(sides[name], source, name) for name in (sides if turn % 2 else reversed(sides))}
        mine, theirs = seconds["ours"], seconds["cp"]
        ratios.append(theirs / mine)
        print(f"ours {DISK_BYTES / 1e6 / mine:.0f} MB/s, cp {DISK_BYTES / 1e6 / theirs:.0f} MB/s", flush=True)
    return ratios


def _cp(source: Path) -> Callable[[Path], None]:
    def copy(out: Path) -> None:
        subprocess.run(["cp", str(source), str(out)], check=True)
        with out.open("rb") as file:
            os.fsync(file.fileno())

    return copy


def _timed(work: Callable[[Path], None], source: Path, name: str) -> float:
    out = source.with_name(f"{name}.raw")
    # What the side before has left unwritten is not this one's.
    os.sync()
    began_s = time.monotonic()
    work(out)
    seconds = time.monotonic() - began_s
    assert filecmp.cmp(source, out, shallow=False)
    out.unlink()
    return seconds
