"""Outside programs as objects: readiness, terminate, then kill; supervised, they are restarted as systemd would.

A program that nobody killed must not end: ``crashes`` lists the exits that the test did not ask for.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

LOG_TAIL_LINES = 40
RESTART_S = 0.1
"""What `RestartSec=` of our units says."""


class ProgramFailed(Exception):
    """A program ended, or was not ready in time. Carries the end of its log."""


class Program:
    """One program. ``ready`` is polled until it returns something true; it may raise ``OSError`` until then."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        log_dir: Path,
        *,
        ready: Callable[[], object] | None = None,
        ready_s: float = 20.0,
        stop_s: float = 20.0,
        env: Mapping[str, str] | None = None,
        stop_signal: signal.Signals = signal.SIGTERM,
    ) -> None:
        self.name = name
        # Dies with the test process, whatever happens to it: nothing is left behind.
        self.argv = ["setpriv", "--pdeathsig", "KILL", *argv]
        self.log = log_dir / f"{name}.log"
        self.crashes: list[int] = []
        self.starts = 0
        self._ready = ready
        self._ready_s = ready_s
        self._stop_s = stop_s
        self._stop_signal = stop_signal
        self._env = dict(os.environ) | dict(env or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.RLock()
        self._stopping = threading.Event()
        self._watcher: threading.Thread | None = None
        self._killed: set[int] = set()

    # --- state ----------------------------------------------------------------------------------------------------
    @property
    def pid(self) -> int:
        with self._lock:
            assert self._process is not None, f"{self.name} was never started"
            return self._process.pid

    @property
    def running(self) -> bool:
        with self._lock:
            return self._process is not None and self._process.poll() is None

    def log_tail(self, lines: int = LOG_TAIL_LINES) -> str:
        try:
            text = self.log.read_text(errors="replace").splitlines()[-lines:]
        except FileNotFoundError:
            text = []
        return f"--- {self.name} ({self.log}) ---\n" + "\n".join(text)

    # --- life -----------------------------------------------------------------------------------------------------
    def start(self, *, supervised: bool = False) -> None:
        """Start and wait for readiness. ``supervised``: start again whenever it ends, until it is stopped."""
        self._stopping = threading.Event()
        self._spawn()
        if supervised:
            self._watcher = threading.Thread(
                target=self._watch, args=(self._stopping,), name=f"watch-{self.name}", daemon=True
            )
            self._watcher.start()
        self.wait_ready()

    def wait_ready(self, deadline_s: float | None = None) -> None:
        if self._ready is None:
            return
        end = time.monotonic() + (deadline_s or self._ready_s)
        while True:
            # Not ready yet looks like a refused connection or a missing file.
            with contextlib.suppress(OSError):
                if self._ready():
                    return
            if self._watcher is None and not self.running:
                raise ProgramFailed(f"{self.name} ended with {self._code()} before it was ready\n{self.log_tail()}")
            if time.monotonic() > end:
                raise ProgramFailed(f"{self.name} was not ready in time\n{self.log_tail()}")
            time.sleep(0.02)

    def wait(self, deadline_s: float) -> int:
        """The exit code, once it has ended by itself."""
        assert self._process is not None
        try:
            return self._process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            raise ProgramFailed(f"{self.name} did not end within {deadline_s} s\n{self.log_tail()}") from None

    def kill(self) -> None:
        """SIGKILL. A supervised program comes back by itself."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                return
            self._killed.add(self._process.pid)
            process = self._process
            process.kill()
        process.wait()

    def kill_for_good(self) -> None:
        """SIGKILL, and do not restart until ``start``."""
        self._unwatch()
        self.kill()

    def stop(self) -> int | None:
        """Ask it to end; SIGKILL after the deadline, which counts as a failure of its own."""
        self._unwatch()
        with self._lock:
            process = self._process
        if process is None:
            return None
        if process.poll() is None:
            self._killed.add(process.pid)
            process.send_signal(self._stop_signal)
            try:
                process.wait(self._stop_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise ProgramFailed(f"{self.name} did not stop within {self._stop_s} s\n{self.log_tail()}") from None
        return process.returncode

    def close(self) -> None:
        """End it by any means; never raises."""
        with contextlib.suppress(ProgramFailed):
            self.stop()

    # --- inside ---------------------------------------------------------------------------------------------------
    def _spawn(self) -> None:
        with self._lock, self.log.open("ab") as log:
            assert not self.running, f"{self.name} runs already"
            self._process = subprocess.Popen(
                self.argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._env,
                # A terminal's interrupt is for the test alone: it still needs its programs to tidy up.
                process_group=0,
            )
            self.starts += 1

    def _watch(self, stopping: threading.Event) -> None:
        while True:
            process = self._process
            assert process is not None
            code = process.wait()
            if process.pid not in self._killed:
                self.crashes.append(code)
            if stopping.wait(RESTART_S):
                return
            with self._lock:
                if stopping.is_set():
                    return
                self._spawn()

    def _unwatch(self) -> None:
        """From here on nothing is started again. The watcher ends when the process has: PDEATHSIG counts the death of
        the thread that started it, so it must not end before."""
        with self._lock:
            self._stopping.set()
            if self._process is not None and self._process.poll() is None:
                self._killed.add(self._process.pid)
        self._watcher = None

    def _code(self) -> int | None:
        with self._lock:
            return None if self._process is None else self._process.returncode


def run(argv: Sequence[str], *, deadline_s: float = 60.0, codes: Sequence[int] = (0,)) -> str:
    """Run to the end; its output. Raises ``ProgramFailed`` with all of it on any other exit code."""
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=deadline_s, check=False)
    output = done.stdout.decode(errors="replace")
    if done.returncode not in codes:
        raise ProgramFailed(
            f"{' '.join(argv)} ended with {done.returncode}\n{output}{done.stderr.decode(errors='replace')}"
        )
    return output
