"""Run the benchmarks named on the command line, or all of them, and merge their figures into the summary.

    python -m tests.bench [tps] [cost] [limits] [dedup]

Raw figures go to standard output as they are measured; ``build/bench/summary.json`` holds one figure per key.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.bench import agent_cost, any_second, capture_limits, compare_tools, dedup, ingest, recover, steady, tps

SUMMARY = Path("build/bench/summary.json")
BENCHMARKS = {
    "any_second": any_second.measure,
    "tps": tps.measure,
    "cost": agent_cost.measure,
    "limits": capture_limits.measure,
    "dedup": dedup.measure,
    "recover": recover.measure,
    "compare_tools": compare_tools.measure,
    "ingest": ingest.measure,
    "steady": steady.measure,
}


def main(names: list[str]) -> None:
    unknown = set(names) - set(BENCHMARKS)
    if unknown:
        sys.exit(f"unknown benchmarks: {', '.join(sorted(unknown))}; known: {', '.join(BENCHMARKS)}")
    SUMMARY.parent.mkdir(parents=True, exist_ok=True)
    for name in names or BENCHMARKS:
        print(f"== {name}", flush=True)
        figures = BENCHMARKS[name]()
        summary = json.loads(SUMMARY.read_text()) if SUMMARY.exists() else {}
        summary.update(figures)
        SUMMARY.write_text(json.dumps(summary, indent=2, sort_keys=True) + "\n")
        print(json.dumps(figures, indent=2), flush=True)


main(sys.argv[1:])
