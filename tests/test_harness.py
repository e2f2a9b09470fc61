"""The harness itself, where it could harm the host."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

INTERRUPTED = """
import signal, sys, time
from pathlib import Path
from tests.harness.process import Program

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is started with it ignored
program = Program("sleeper", ["sleep", "infinity"], Path(sys.argv[1]))
program.start()
try:
    print("ready", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("running" if program.running else "gone", flush=True)
    program.close()
print("running" if program.running else "closed", flush=True)
"""


def test_an_interrupt_leaves_the_programs_to_the_test(tmp_path: Path) -> None:
    """Ctrl-C goes to a whole process group. What a test has mounted and attached is undone with its programs' help."""
    argv = [sys.executable, "-c", INTERRUPTED, str(tmp_path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, process_group=0) as test:
        assert test.stdout is not None and test.stdout.readline() == "ready\n"
        os.killpg(test.pid, signal.SIGINT)
        assert test.stdout.read().split() == ["running", "closed"]
