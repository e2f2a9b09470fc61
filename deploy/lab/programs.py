"""Programs that the lab runs: short ones to their end, long ones in the background, found again by a later command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from deploy.lab.errors import LabFailed, LabNotReady

TERMINATE_S = 10.0
"""After this long a program that was asked to end is killed."""
_POLL_S = 0.05


def run(arguments: Sequence[str], *, deadline_s: float = 60.0, input_text: str | None = None) -> str:
    """Run a program to its end and return what it wrote; raises ``LabFailed`` unless it succeeds."""
    try:
        done = subprocess.run(
            list(arguments),
            input=input_text or "",
            capture_output=True,
            timeout=deadline_s,
            check=False,
            encoding="utf-8",
            errors="replace",
        )
    except subprocess.TimeoutExpired as error:
        raise LabFailed(
            f"{' '.join(arguments[:6])} .. did not end within {deadline_s:.0f} s.", arguments=list(arguments)
        ) from error
    if done.returncode != 0:
        output = (done.stderr or done.stdout).strip()[-2000:]
        raise LabFailed(
            f"{' '.join(arguments)} failed with status {done.returncode}: {output}",
            arguments=list(arguments),
            status=done.returncode,
        )
    return done.stdout


def wait_until(condition: Callable[[], object], deadline_s: float, what: str, remedy: str = "") -> None:
    """Return once ``condition()`` is true; raises ``LabNotReady`` naming ``what``."""
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            raise LabNotReady(f"{what} did not happen within {deadline_s:.0f} s.", remedy=remedy)
        time.sleep(_POLL_S)


@dataclass(frozen=True)
class Process:
    """A process, told apart from a later one with the same number by its start time (clock ticks since boot)."""

    name: str
    pid: int
    started: int

    @property
    def alive(self) -> bool:
        state = _stat(self.pid)
        return state is not None and state[1] == self.started and state[0] != "Z"

    def signal(self, number: int) -> None:
        if self.alive:
            os.kill(self.pid, number)


class Processes:
    """The lab's background programs, recorded in a file so that ``down`` ends what an earlier ``up`` started."""

    def __init__(self, record: Path, logs: Path) -> None:
        self._record = record
        self._logs = logs
        self._children: dict[int, subprocess.Popen[bytes]] = {}

    def all(self) -> list[Process]:
        """In the order in which they were started."""
        if not self._record.exists():
            return []
        return [Process(**entry) for entry in json.loads(self._record.read_text())]

    def find(self, name: str) -> Process | None:
        return next((process for process in self.all() if process.name == name), None)

    def log_of(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    def start(self, name: str, arguments: Sequence[str], *, environment: dict[str, str] | None = None) -> Process:
        """Start a program in a session of its own; its output is appended to ``logs/NAME.log``."""
        with self.log_of(name).open("ab") as log:
            child = subprocess.Popen(
                list(arguments),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **(environment or {})},
            )
        self._children[child.pid] = child
        state = _stat(child.pid)
        if state is None:
            raise LabFailed(f"{name} ended at once.", remedy=f"See {self.log_of(name)}.")
        process = Process(name, child.pid, state[1])
        self._save([*(other for other in self.all() if other.name != name), process])
        return process

    def check(self, process: Process) -> None:
        """Raise ``LabFailed`` if it is gone."""
        if not process.alive:
            log = self.log_of(process.name)
            raise LabFailed(
                f"{process.name} has ended: {log.read_text(errors='replace')[-1500:].strip()}", log=str(log)
            )

    def stop(self, name: str, terminate_s: float = TERMINATE_S) -> None:
        """Ask it to end, then kill it; forget it."""
        process = self.find(name)
        if process is None:
            return
        process.signal(signal.SIGTERM)
        end = time.monotonic() + terminate_s
        while process.alive and time.monotonic() < end:
            time.sleep(_POLL_S)
        self.kill(name)

    def kill(self, name: str) -> None:
        """SIGKILL, and wait until it is gone; forget it."""
        process = self.find(name)
        if process is None:
            return
        process.signal(signal.SIGKILL)
        wait_until(lambda: not process.alive, TERMINATE_S, f"the end of {name}")
        child = self._children.pop(process.pid, None)
        if child is not None:
            child.wait()
        self._save([other for other in self.all() if other.name != name])

    def stop_all(self) -> None:
        """The last one first."""
        for process in reversed(self.all()):
            self.stop(process.name)

    def _save(self, processes: list[Process]) -> None:
        partial = self._record.with_suffix(".partial")
        partial.write_text(json.dumps([asdict(process) for process in processes], indent=1))
        partial.rename(self._record)


def _stat(pid: int) -> tuple[str, int] | None:
    """State and start time of a process; None if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(") ")[2].split()
    return fields[0], int(fields[19])
