"""A journal that is full and stays full. Keys: ``steady_state_ratio``, ``folding_ingest_p99_ms``.

Segments of 4 MiB as fast as the store takes them, at random places of a disk, into a journal that is limited by bytes;
retention runs as in the server. The journal fills up, then is turned over three times. While it is past its limit by
more than a quarter, the writer waits for retention, as an agent does that is refused; that time counts.

``steady_state_ratio``: throughput of the last tenth of the turning over against its first; ``steady_fill_ratio``: all
of it against the filling, when nothing is folded; ``steady_size_ratio``: the most disk that the store took
against the journal's limit and the disk's size; ``folding_ingest_p99_ms``: of ``put_segment`` at a rate of 20 MB/s
while retention folds.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import tempfile
import time
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
PACED_SEGMENTS = 200
PACED_BYTES_PER_S = 20e6


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
    directory = Path(tempfile.mkdtemp(prefix="cdp-bench-steady-", dir=os.environ.get("CDP_BENCH_DIR")))
    try:
        return asyncio.run(_measure(directory))
    finally:
        shutil.rmtree(directory)


async def _measure(directory: Path) -> dict[str, float]:
    policy = RetentionPolicy(keep_s=None, max_bytes=LIMIT_BYTES)
    with Store.open(directory / "store", file_bytes=FILE_BYTES) as store:
        writer = Writer(store)
        upkeep = Upkeep(store, lambda _: policy, interval_s=0.2)
        upkeep.start()
        try:
            figures = await asyncio.to_thread(_run, store, writer, directory)
        finally:
            await upkeep.close()
        folded = upkeep.kept(writer.machine)
        print(f"folded {folded.segments} segments in {folded.fold_s:.1f} s, freed {folded.freed_bytes >> 20} MiB")
        assert folded.error is None and verify(store, writer.machine).clean
    return figures


def _run(store: Store, writer: Writer, directory: Path) -> dict[str, float]:
    per_turn = LIMIT_BYTES // SEGMENT_BYTES
    fill = [writer.put() for _ in range(per_turn)]
    sizes = [_stored_bytes(directory)]
    turns: list[float] = []
    for turn in range(TURNS):
        took = [writer.put() for _ in range(per_turn)]
        sizes.append(_stored_bytes(directory))
        turns += took
        print(f"turn {turn}: {_rate(took):.0f} MB/s, {sizes[-1] >> 20} MiB on disk", flush=True)
    tenth = len(turns) // 10
    first, last = turns[:tenth], turns[-tenth:]
    print(f"fill {_rate(fill):.0f} MB/s, first tenth {_rate(first):.0f} MB/s, last tenth {_rate(last):.0f} MB/s")
    paced = sorted(_paced(writer))
    p50, p99 = paced[len(paced) // 2], paced[int(len(paced) * 0.99)]
    print(f"while folding, at {PACED_BYTES_PER_S / 1e6:.0f} MB/s: p50 {1000 * p50:.0f} ms, p99 {1000 * p99:.0f} ms")
    return {
        "steady_state_ratio": round(_rate(last) / _rate(first), 3),
        "steady_fill_ratio": round(_rate(turns) / _rate(fill), 3),
        "steady_size_ratio": round(max(sizes[1:]) / (LIMIT_BYTES + DISK_BYTES), 3),
        "folding_ingest_p99_ms": round(1000 * p99, 1),
    }


def _paced(writer: Writer) -> list[float]:
    latencies = []
    began = time.monotonic()
    for number in range(PACED_SEGMENTS):
        due = began + number * SEGMENT_BYTES / PACED_BYTES_PER_S
        time.sleep(max(0.0, due - time.monotonic()))
        latencies.append(writer.put())
    return latencies


def _rate(took: list[float]) -> float:
    return len(took) * SEGMENT_BYTES / sum(took) / 1e6


def _stored_bytes(directory: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in directory.rglob("*") if path.is_file())
