"""A journal that is full and stays full. Keys: ``steady_state_ratio``, ``folding_ingest_p99_ms``.

Segments of 4 MiB at random places of a disk, into a journal that is limited by bytes; retention runs as in the server.
The journal fills up, then is turned over three times. While it is past its limit by more than a quarter, the writer
waits for retention, as an agent does that is refused; that time counts. Twice, each time in a store of its own:

*At a rate*, which is far above that of a busy database: ``steady_state_ratio`` is the throughput of the last tenth of
everything, when all of it is folded as fast as it comes, against that of the first tenth, when nothing is;
``folding_ingest_p99_ms`` and ``_max_ms`` are of ``put_segment`` while retention folds.

*As fast as it goes*: ``steady_unpaced_mb_s`` is what the store takes while it folds; the last tenth of that against its
first is ``steady_unpaced_tenths_ratio``, all of it against the filling is ``steady_unpaced_fill_ratio``, which is below
1 by nature: what is folded is written a second time, to the same disk. ``steady_size_ratio``: the most disk that the
store took, in both, against the journal's limit and the disk's size.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from cdp.server.retention_messages import RetentionPolicy
from cdp.server.upkeep import Upkeep
from cdp.store import Store, verify
from journal.encoder import Encoder
from journal.extent import Extents, Kind
from journal.segment import FRAME_BYTES
from journal.wire import DiskInfo

FILE_BYTES = 32 << 20
LIMIT_BYTES = 512 << 20
SEGMENT_BYTES = 4 << 20
EXTENT_BYTES = FRAME_BYTES
DISK_BYTES = 512 << 20
TURNS = 3
PER_TURN = LIMIT_BYTES // SEGMENT_BYTES
PACED_BYTES_PER_S = 200e6
Run = Callable[["Writer", Path], tuple[dict[str, float], int]]


class Writer:
    """Seals what it is told to put; sealing is not counted."""

    def __init__(self, store: Store) -> None:
        self._store = store
        disk = DiskInfo(index=0, name="vda", size_bytes=DISK_BYTES)
        self.machine = store.create_machine("m", [disk]).uuid
        self._position = store.live(self.machine)
        self._encoder = Encoder(self.machine)
        self._random = random.Random(1)
        self._noise = self._random.randbytes(SEGMENT_BYTES)

    def put(self) -> float:
        """Seconds that the store took, and that retention was waited for."""
        numbers = sorted(self._random.sample(range(DISK_BYTES // EXTENT_BYTES), SEGMENT_BYTES // EXTENT_BYTES))
        now_ns = time.time_ns()
        header, raw = self._encoder.encode(
            self._position,
            Extents.from_rows([(0, number * EXTENT_BYTES, EXTENT_BYTES, Kind.DATA) for number in numbers]),
            [self._noise],
            opened_at_ns=now_ns,
            sealed_at_ns=now_ns,
            sealed_monotonic_ns=0,
        )
        self._position = header.position
        began = time.perf_counter()
        while self._store.pool.bytes_of(self.machine) > LIMIT_BYTES * 5 // 4:
            time.sleep(0.001)
        self._store.put_segment(self.machine, raw)
        return time.perf_counter() - began


def measure() -> dict[str, float]:
    figures: dict[str, float] = {}
    sizes = []
    for run in (_paced, _unpaced):
        directory = Path(tempfile.mkdtemp(prefix="cdp-bench-steady-", dir=os.environ.get("CDP_BENCH_DIR")))
        try:
            of_run, size = asyncio.run(_with_retention(directory, run))
        finally:
            shutil.rmtree(directory)
        figures |= of_run
        sizes.append(size)
    return figures | {"steady_size_ratio": round(max(sizes) / (LIMIT_BYTES + DISK_BYTES), 3)}


async def _with_retention(directory: Path, run: Run) -> tuple[dict[str, float], int]:
    """What ``run`` measured, and the most bytes on the disk at the end of a turn."""
    policy = RetentionPolicy(keep_s=None, max_bytes=LIMIT_BYTES)
    with Store.open(directory / "store", file_bytes=FILE_BYTES) as store:
        writer = Writer(store)
        upkeep = Upkeep(store, lambda _: policy, interval_s=0.2)
        upkeep.start()
        try:
            done = await asyncio.to_thread(run, writer, directory)
        finally:
            await upkeep.close()
        folded = upkeep.kept(writer.machine)
        print(f"folded {folded.segments} segments in {folded.fold_s:.1f} s, freed {folded.freed_bytes >> 20} MiB")
        assert folded.error is None and verify(store, writer.machine).clean
    return done


def _paced(writer: Writer, directory: Path) -> tuple[dict[str, float], int]:
    took: list[float] = []
    done_s = [time.monotonic()]
    sizes = []
    for number in range(PER_TURN * (1 + TURNS)):
        due_s = done_s[0] + number * SEGMENT_BYTES / PACED_BYTES_PER_S
        time.sleep(max(0.0, due_s - time.monotonic()))
        took.append(writer.put())
        done_s.append(time.monotonic())
        if (number + 1) % PER_TURN == 0:
            sizes.append(_stored_bytes(directory))
            rate = PER_TURN * SEGMENT_BYTES / (done_s[-1] - done_s[-1 - PER_TURN]) / 1e6
            print(f"at a rate, turn {number // PER_TURN}: {rate:.1f} MB/s, {sizes[-1] >> 20} MiB on disk", flush=True)
    tenth = len(took) // 10
    first_s, last_s = done_s[tenth] - done_s[0], done_s[-1] - done_s[-1 - tenth]
    folding = sorted(took[PER_TURN:])
    p50, p99 = folding[len(folding) // 2], folding[int(len(folding) * 0.99)]
    print(f"tenths of {tenth} segments: the first in {first_s:.2f} s, the last in {last_s:.2f} s")
    print(f"while folding: p50 {1000 * p50:.0f} ms, p99 {1000 * p99:.0f} ms, at most {1000 * folding[-1]:.0f} ms")
    figures = {
        "steady_state_ratio": round(first_s / last_s, 3),
        "folding_ingest_p99_ms": round(1000 * p99, 1),
        "folding_ingest_max_ms": round(1000 * folding[-1], 1),
    }
    return figures, max(sizes[1:])


def _unpaced(writer: Writer, directory: Path) -> tuple[dict[str, float], int]:
    fill = [writer.put() for _ in range(PER_TURN)]
    sizes = []
    turns: list[float] = []
    for turn in range(TURNS):
        took = [writer.put() for _ in range(PER_TURN)]
        sizes.append(_stored_bytes(directory))
        turns += took
        print(f"as fast as it goes, turn {turn}: {_rate(took):.0f} MB/s, {sizes[-1] >> 20} MiB on disk", flush=True)
    tenth = len(turns) // 10
    first, last = turns[:tenth], turns[-tenth:]
    print(f"fill {_rate(fill):.0f} MB/s, first tenth {_rate(first):.0f} MB/s, last tenth {_rate(last):.0f} MB/s")
    figures = {
        "steady_unpaced_mb_s": round(_rate(turns), 1),
        "steady_unpaced_tenths_ratio": round(_rate(last) / _rate(first), 3),
        "steady_unpaced_fill_ratio": round(_rate(turns) / _rate(fill), 3),
    }
    return figures, max(sizes)


def _rate(took: list[float]) -> float:
    return len(took) * SEGMENT_BYTES / sum(took) / 1e6


def _stored_bytes(directory: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in directory.rglob("*") if path.is_file())
