"""Who gets the processors: the agent what its unit grants it, server and standby what the source leaves."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from tests.bench.account import family

UNIT = Path(__file__).parents[2] / "deploy/systemd/cdp-agent.service"


def only_when_idle(*pids: int) -> None:
    """SCHED_IDLE for every thread of these processes and their descendants: in reality they are other machines."""
    for thread in _threads(*pids):
        os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))


def as_its_unit_says(agent_pid: int) -> None:
    """The agent's niceness, as systemd starts it. Its drainer has real-time priority and keeps it."""
    found = re.search(r"^Nice=(\d+)$", UNIT.read_text(), re.MULTILINE)
    assert found is not None
    for thread in _threads(agent_pid):
        os.setpriority(os.PRIO_PROCESS, thread, int(found[1]))


def _threads(*pids: int) -> Iterator[int]:
    for pid in pids:
        for member in family(pid):
            for task in Path(f"/proc/{member}/task").iterdir():
                yield int(task.name)
