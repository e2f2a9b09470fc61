"""The server and the standby are other machines in reality: here they get only the time that the source leaves."""

from __future__ import annotations

import os
from pathlib import Path

from tests.bench.account import family


def only_when_idle(*pids: int) -> None:
    """SCHED_IDLE for every thread of these processes and their descendants."""
    for pid in pids:
        for member in family(pid):
            for task in Path(f"/proc/{member}/task").iterdir():
                os.sched_setscheduler(int(task.name), os.SCHED_IDLE, os.sched_param(0))
