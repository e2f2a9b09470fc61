"""Durable ingest against the disk's own limit. Key: ``ingest_ratio_8mb``, the worse median of one and of 50 machines.

A pair is ``put_segment`` of 8 MB segments and, in the same file system and as many bytes, sequential writes of 8 MB to
a file with an fdatasync after each; the order within a pair alternates. Both write where they wrote before (segment
files are recycled by retention, the plain file is overwritten), so that neither pays for the first touch of a block. 50
machines write from as many threads as the server has for it. Small segments are told by their latency.
"""

from __future__ import annotations

import os
import random
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from cdp.server.workers import WRITERS
from cdp.store import Store
from journal.encoder import Encoder
from journal.extent import Extents, Kind
from journal.wire import DiskInfo

PAIRS = 5
SEGMENT_BYTES = 8_000_000 // 4096 * 4096
SMALL_BYTES = 64 << 10
SMALL_SEGMENTS = 300
ROUND_BYTES = 400_000_000
DISK_BYTES = 1 << 30
FILE_BYTES = 256 << 20


class Machine:
    """Seals segments whose content is the same noise each time: what is measured is the store, not the encoder."""

    def __init__(self, store: Store, name: str, size_bytes: int) -> None:
        disk = DiskInfo(index=0, name="vda", size_bytes=DISK_BYTES)
        self._store = store
        self.uuid = store.create_machine(name, [disk]).uuid
        self.position = store.live(self.uuid)
        self._encoder = Encoder(self.uuid)
        self._noise = random.Random(1).randbytes(size_bytes)
        self._seconds = 0

    def seal(self, *, empty: bool = False) -> bytes:
        self._seconds += 1
        at = self._seconds * len(self._noise) % (DISK_BYTES - len(self._noise)) // 4096 * 4096
        header, raw = self._encoder.encode(
            self.position,
            Extents.from_rows([] if empty else [(0, at, len(self._noise), Kind.DATA)]),
            [] if empty else [self._noise],
            opened_at_ns=self._seconds * 10**9,
            sealed_at_ns=(self._seconds + 1) * 10**9,
            sealed_monotonic_ns=0,
        )
        self.position = header.position
        return bytes(raw)

    def put(self, raw: bytes) -> float:
        began = time.perf_counter()
        self._store.put_segment(self.uuid, raw)
        return time.perf_counter() - began


def measure() -> dict[str, float]:
    figures: dict[str, float] = {}
    directory = Path(tempfile.mkdtemp(prefix="cdp-bench-ingest-", dir=os.environ.get("CDP_BENCH_DIR")))
    try:
        ratios = {count: _pairs(directory / str(count), count) for count in (1, 50)}
        for count, ratio in ratios.items():
            figures[f"ingest_ratio_8mb_{count}"] = round(ratio, 3)
        figures["ingest_ratio_8mb"] = round(min(ratios.values()), 3)
        for count in (1, 50):
            latencies = _small(directory / f"small-{count}", count)
            p50, p99 = statistics.median(latencies), latencies[int(len(latencies) * 0.99)]
            print(f"{count} machines, 64 KiB: p50 {1000 * p50:.1f} ms, p99 {1000 * p99:.1f} ms", flush=True)
            figures[f"ingest_small_p50_ms_{count}"] = round(1000 * p50, 1)
            figures[f"ingest_small_p99_ms_{count}"] = round(1000 * p99, 1)
    finally:
        shutil.rmtree(directory)
    return figures


def _pairs(directory: Path, count: int) -> float:
    """The median of the ratios."""
    directory.mkdir()
    ratios = []
    with Store.open(directory / "store", file_bytes=FILE_BYTES, spares_max=1000) as store:
        sides = (partial(_ingest, store, count), partial(_sequential, directory / "plain"))
        for side in sides:
            side()  # every block is touched once
        for turn in range(PAIRS):
            first, second = sides if turn % 2 else sides[::-1]
            rates = {first: first()}
            rates[second] = second()
            store_rate, plain_rate = (rates[side] for side in sides)
            ratios.append(store_rate / plain_rate)
            print(
                f"{count} machines, pair {turn}: store {store_rate:.0f} MB/s, plain {plain_rate:.0f} MB/s, "
                f"ratio {ratios[-1]:.3f}",
                flush=True,
            )
    return statistics.median(ratios)


def _ingest(store: Store, count: int) -> float:
    """MB/s. Sealing is not counted: it is done before, for as much as memory holds at a time."""
    machines = [Machine(store, f"m{number}", SEGMENT_BYTES) for number in range(count)]
    for machine in machines:
        machine.put(machine.seal(empty=True))  # takes a file, as happens once in 256 MiB
    left = ROUND_BYTES // SEGMENT_BYTES
    took = 0.0
    with ThreadPoolExecutor(WRITERS) as pool:
        while left > 0:
            batch = machines[:left] if count > 1 else machines * min(8, left)
            sealed = [(machine, machine.seal()) for machine in batch]
            began = time.perf_counter()
            if count > 1:
                list(pool.map(lambda pair: pair[0].put(pair[1]), sealed))
            else:
                for machine, raw in sealed:
                    machine.put(raw)
            took += time.perf_counter() - began
            left -= len(sealed)
    for machine in machines:
        store.remove_machine(machine.uuid)
    return ROUND_BYTES // SEGMENT_BYTES * SEGMENT_BYTES / took / 1e6


def _sequential(path: Path) -> float:
    """MB/s of writes, each made durable."""
    noise = random.Random(2).randbytes(SEGMENT_BYTES)
    count = ROUND_BYTES // SEGMENT_BYTES
    handle = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        began = time.perf_counter()
        for _ in range(count):
            os.write(handle, noise)
            os.fdatasync(handle)
        return count * SEGMENT_BYTES / (time.perf_counter() - began) / 1e6
    finally:
        os.close(handle)


def _small(directory: Path, count: int) -> list[float]:
    """Seconds that each small segment took, sorted."""
    with Store.open(directory, file_bytes=64 << 20) as store, ThreadPoolExecutor(WRITERS) as pool:
        machines = [Machine(store, f"m{number}", SMALL_BYTES) for number in range(count)]
        latencies: list[float] = []
        for _ in range(max(1, SMALL_SEGMENTS // count)):
            sealed = [(machine, machine.seal()) for machine in machines]
            latencies.extend(pool.map(lambda pair: pair[0].put(pair[1]), sealed))
        return sorted(latencies)
