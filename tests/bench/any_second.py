"""A day of history, and any second of it at once: 86,400 segments of 500 extents each of one machine.

The store is made directly, through its own formats. Then a server is started on it, and 50 random seconds are exported
over NBD, each compared with the model bit for bit: single blocks, ranges, and the part that is written most. Keys:
``any_second_open_s`` (from the server's start to its first answer about a second, index and all),
``any_second_first_block_s`` (the slowest, and ``..._median_s``: from the request for a second to its first block
through nbdkit), ``any_second_rss_mb`` (the most that the server, nbdkit and 'cdp export' ever had, added up).
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cdp.cli.client import Client, connect
from cdp.cli.nbd import Listen, hold, nbd
from cdp.cli.point import find_point
from cdp.store import Store
from journal.wire import DiskInfo
from tests.bench.account import family, peak_bytes
from tests.harness.longhistory import BLOCK, LongHistory, Unsynced, content
from tests.harness.nbdclient import NbdClient
from tests.harness.site import Site

DAY = LongHistory(seconds=86_400, disk_bytes=32 << 30)
SECONDS_READ = 50
RANGES = 12
RANGE_BYTES = 128 << 10
HOT_BYTES = 1 << 20


def measure() -> dict[str, float]:
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"seed {seed}", flush=True)
    directory = Path(tempfile.mkdtemp(prefix="cdp-any-second-"))
    # The history is a day old at its beginning: nothing of it is to be folded away meanwhile.
    site = Site(directory, "[retention]\nkeep_s = 172800.0\n")
    try:
        site.initialise()
        start_ns = time.time_ns() - DAY.seconds * 10**9
        _build(directory / "state/store", start_ns)
        os.environ["CDP_CREDENTIAL"] = str(site.credential)
        return _serve(site, start_ns, random.Random(seed))
    finally:
        os.environ.pop("CDP_CREDENTIAL", None)
        if site.process is not None:
            site.stop()
        shutil.rmtree(directory)


def _build(directory: Path, start_ns: int) -> None:
    began_s = time.monotonic()
    with Store.open(directory, fs=Unsynced()) as store:
        disk = DiskInfo(index=0, name="vda", size_bytes=DAY.disk_bytes)
        machine = store.create_machine("db1", [disk]).uuid
        DAY.fill(store, machine, start_ns)
        built_s = time.monotonic() - began_s
    used = sum(path.stat().st_blocks * 512 for path in directory.rglob("*") if path.is_file())
    print(f"{DAY.seconds} seconds made in {built_s:.0f} s, {used / 1e9:.2f} GB of store", flush=True)


def _serve(site: Site, start_ns: int, rng: random.Random) -> dict[str, float]:
    began_s = time.monotonic()
    site.start()
    client = connect()
    find_point(client, "db1", start_ns / 1e9 + DAY.seconds // 2, None, latest=False)
    open_s = time.monotonic() - began_s
    print(f"open: {open_s:.2f} s", flush=True)
    firsts: list[float] = []
    resident: list[int] = []
    chosen = sorted(rng.sample(range(1, DAY.seconds + 1), SECONDS_READ))
    compared = 0
    for second, last in _at(chosen):
        first_s, compared_bytes, nbdkit_bytes = _read(client, start_ns / 1e9 + second, second, last, rng)
        firsts.append(first_s)
        compared += compared_bytes
        resident.append(peak_bytes(_family(site)) + nbdkit_bytes)
    command_s, command_bytes = _command(site, start_ns / 1e9 + chosen[0], chosen[0])
    resident.append(command_bytes)
    print("first blocks, ms:", " ".join(f"{one * 1e3:.0f}" for one in firsts))
    print(f"{SECONDS_READ} seconds right, {compared / 1e6:.0f} MB; 'cdp export' to first block: {command_s:.2f} s")
    return {
        "any_second_open_s": round(open_s, 2),
        "any_second_first_block_s": round(max(firsts), 3),
        "any_second_first_block_median_s": round(statistics.median(firsts), 3),
        "any_second_command_s": round(command_s, 2),
        "any_second_rss_mb": round(max(resident) / 1e6, 1),
        "any_second_right": len(firsts),
    }


def _at(chosen: list[int]) -> Iterator[tuple[int, npt.NDArray[np.uint64]]]:
    """The model at each of the seconds, which ascend."""
    wanted = set(chosen)
    for second, last in enumerate(DAY.last_writers()):
        if second in wanted:
            yield second, last


def _read(
    client: Client, at_s: float, second: int, last: npt.NDArray[np.uint64], rng: random.Random
) -> tuple[float, int, int]:
    """Seconds to the first block, bytes compared, resident bytes of nbdkit. Raises if anything differs."""
    written = DAY.written(second)
    places = [(int(rng.choice(written)) * BLOCK, BLOCK)]
    places += [(rng.randrange(0, DAY.disk_bytes - RANGE_BYTES) // BLOCK * BLOCK, RANGE_BYTES) for _ in range(RANGES)]
    places += [(int(block) * BLOCK, BLOCK) for block in rng.sample(written.tolist(), 20)]
    places.append((rng.randrange(0, DAY.disk_bytes // 128) // BLOCK * BLOCK, HOT_BYTES))
    began_s = time.monotonic()
    point = find_point(client, "db1", at_s, None, latest=False)
    first_s = 0.0
    with tempfile.TemporaryDirectory() as directory, hold(client, point) as held:
        socket = Path(directory) / "nbd"
        with nbd(held, Listen(socket), point.disks) as server, NbdClient(socket, "vda") as image:
            for offset, length in places:
                found = image.read(offset, length)
                first_s = first_s or time.monotonic() - began_s
                assert found == content(last, offset, length), f"second {second} differs in {length} bytes at {offset}"
            nbdkit_bytes = peak_bytes(family(server.pid))
    return first_s, sum(length for _, length in places), nbdkit_bytes


def _command(site: Site, at_s: float, second: int) -> tuple[float, int]:
    """As an operator starts it: seconds to the first block, and the resident bytes of all that takes part."""
    offset = int(DAY.written(second)[0]) * BLOCK
    with (
        tempfile.TemporaryDirectory() as directory,
        _exporting(site, Path(directory) / "nbd", at_s) as (process, began_s),
    ):
        with NbdClient(Path(directory) / "nbd", "vda") as image:
            assert any(image.read(offset, BLOCK))
            first_s = time.monotonic() - began_s
            for _ in range(200):
                image.read(random.randrange(0, DAY.disk_bytes) // BLOCK * BLOCK, BLOCK)
        return first_s, peak_bytes([*_family(site), *family(process.pid)])


@contextmanager
def _exporting(site: Site, socket: Path, at_s: float) -> Iterator[tuple[subprocess.Popen[str], float]]:
    began_s = time.monotonic()
    words = [
        sys.executable,
        "-m",
        "cdp.cli.main",
        "export",
        "db1",
        "--at",
        f"@{at_s:.3f}",
        "--listen",
        f"unix:{socket}",
    ]
    with subprocess.Popen(words, stdout=subprocess.PIPE, env=site.env, text=True) as process:
        try:
            assert process.stdout is not None
            assert "db1 at" in process.stdout.readline()
            yield process, began_s
        finally:
            process.send_signal(signal.SIGINT)


def _family(site: Site) -> list[int]:
    assert site.process is not None
    return family(site.process.pid)
