"""Background programs: recorded, found again by another process, ended however they behave."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from deploy.lab.errors import LabFailed, LabNotReady
from deploy.lab.programs import Process, Processes, run, wait_until


@pytest.fixture
def processes(tmp_path: Path) -> Processes:
    return Processes(tmp_path / "processes.json", tmp_path)


def test_a_program_is_found_and_ended_by_whoever_reads_the_record(processes: Processes, tmp_path: Path) -> None:
    started = processes.start("sleeper", ["sleep", "600"])
    other = Processes(tmp_path / "processes.json", tmp_path)
    assert other.find("sleeper") == started
    assert started.alive
    processes.stop_all()
    wait_until(lambda: not started.alive, 0.1, "its end")
    assert other.all() == []
    other.stop("sleeper")


def test_a_program_that_ignores_the_request_is_killed(processes: Processes) -> None:
    start = time.monotonic()
    stubborn = processes.start("stubborn", ["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.2; done"])
    log = processes.log_of("stubborn")
    wait_until(lambda: "ready" in log.read_text(), 10, "the trap")
    processes.stop("stubborn", terminate_s=0.5)
    assert not stubborn.alive
    assert time.monotonic() - start >= 0.5


def test_a_later_process_of_the_same_number_is_not_ours(processes: Processes) -> None:
    started = processes.start("sleeper", ["sleep", "600"])
    Process(started.name, started.pid, started.started + 1).signal(signal.SIGKILL)
    assert started.alive
    processes.kill("sleeper")


def test_a_program_that_has_ended_is_told_with_its_last_words(processes: Processes) -> None:
    short = processes.start("short", ["sh", "-c", "echo so long; exit 3"])
    wait_until(lambda: not short.alive, 10, "its end")
    with pytest.raises(LabFailed, match="so long"):
        processes.check(short)
    processes.stop_all()


def test_failures_carry_the_output() -> None:
    with pytest.raises(LabFailed, match="status 3: so long"):
        run(["sh", "-c", "echo so long >&2; exit 3"])
    with pytest.raises(LabFailed, match="did not end within"):
        run(["sleep", "600"], deadline_s=0.1)
    with pytest.raises(LabNotReady, match="the impossible"):
        wait_until(lambda: False, 0.1, "the impossible")
