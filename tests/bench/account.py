"""What a process and all its descendants cost, by the kernel's own accounting."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_SAMPLE_S = 0.25


def family(pid: int) -> list[int]:
    """``pid`` and its descendants."""
    found = [pid]
    for member in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{member}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return found


def cpu_s(pids: list[int]) -> float:
    ticks = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / _TICKS_PER_S


def resident_bytes(pids: list[int]) -> int:
    """The sum of resident sets: what is shared between them counts once for each, so this never flatters."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith("VmRSS:"):
                    total += int(line.split()[1]) * 1024
    return total


def peak_bytes(pids: list[int]) -> int:
    """The sum of the largest resident set that each ever had."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    total += int(line.split()[1]) * 1024
    return total


@dataclass(frozen=True, slots=True)
class Cost:
    """``cpu_pct``: of one core; ``rss_mb_max``: the largest sum of resident sets that was sampled, 10^6 bytes."""

    seconds: float
    cpu_pct: float
    rss_mb_max: float


class Meter:
    """Measures from ``__enter__`` to ``__exit__``; ``cost`` is valid afterwards. The family must not change."""

    def __init__(self, pid: int) -> None:
        self._pids = family(pid)
        self._done = threading.Event()
        self._rss_max = 0
        self._sampler = threading.Thread(target=self._sample)
        self.cost = Cost(0, 0, 0)

    def __enter__(self) -> Self:
        self._started_s = time.monotonic()
        self._cpu_s = cpu_s(self._pids)
        self._sampler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        seconds = time.monotonic() - self._started_s
        spent = cpu_s(self._pids) - self._cpu_s
        self._done.set()
        self._sampler.join()
        self.cost = Cost(seconds, 100 * spent / seconds, self._rss_max / 1e6)

    def _sample(self) -> None:
        while True:
            self._rss_max = max(self._rss_max, resident_bytes(self._pids))
            if self._done.wait(_SAMPLE_S):
                return
