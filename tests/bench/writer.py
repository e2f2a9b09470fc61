"""fio as the writer: a fixed rate of random or sequential direct writes whose bytes compress as database pages do."""

from __future__ import annotations

import json
from pathlib import Path

from tests.harness.process import run

COMPRESSIBLE_PCT = 66
"""zstd makes PostgreSQL pages 3 times smaller or better; this asks for 3."""


def write(device: Path, *, seconds: int, block: str, pattern: str, mb_per_s: float | None, depth: int = 8) -> float:
    """Write to ``device`` for ``seconds``; the rate that was reached in 10^6 bytes per second.

    ``pattern``: ``randwrite`` or ``write``; ``mb_per_s`` None: as fast as it goes.
    """
    argv = [
        *("fio", "--name=bench", f"--filename={device}", f"--rw={pattern}", f"--bs={block}", "--direct=1"),
        *("--ioengine=libaio", f"--iodepth={depth}", "--time_based", f"--runtime={seconds}", "--norandommap"),
        *("--refill_buffers", f"--buffer_compress_percentage={COMPRESSIBLE_PCT}", "--buffer_compress_chunk=4k"),
        *("--output-format=json", "--randseed=4711"),
    ]
    if mb_per_s is not None:
        argv.append(f"--rate={int(mb_per_s * 1e6)}")
    report = json.loads(run(argv, deadline_s=seconds + 60))
    return float(report["jobs"][0]["write"]["bw_bytes"]) / 1e6
