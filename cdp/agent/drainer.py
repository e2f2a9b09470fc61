"""The drainer as a child: started, restarted, adopted, stopped.

A drainer whose agent was killed goes on draining, which is the point of it being a process of its own. The next agent
adopts it: it watches it through a pidfd and starts its own when that one ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Final

from cdp.agent.capture import layout
from cdp.agent.capture.errors import SpoolMissing
from cdp.agent.capture.spool import RawSpool
from cdp.agent.errors import DrainerFailed
from cdp.agent.status import Status

RESTART_S: Final = 0.1
FAILURES_MAX: Final = 10
FAILURES_WINDOW_S: Final = 60.0
READY_S: Final = 20.0
STOP_S: Final = 3.0


class Drainer:
    """``run`` keeps one alive until it is cancelled; then it is stopped."""

    def __init__(self, pin_dir: Path, spool_dir: Path, spool_bytes: int, status: Status) -> None:
        self._argv = [
            sys.executable,
            "-m",
            "cdp.agent.capture.drain",
            *("--pin-dir", str(pin_dir)),
            *("--spool-dir", str(spool_dir)),
            *("--spool-bytes", str(spool_bytes)),
        ]
        self._spool_dir = spool_dir
        self._status = status

    async def open_spool(self, capture_id: int) -> RawSpool:
        """The raw spool, once the drainer has made it. Raises ``SpoolMissing`` after ``READY_S``."""
        end = time.monotonic() + READY_S
        while True:
            try:
                return RawSpool.open(self._spool_dir, capture_id)
            except SpoolMissing:
                if time.monotonic() > end:
                    raise
            await asyncio.sleep(0.02)

    async def run(self) -> None:
        """Raises ``DrainerFailed`` if it ends again and again."""
        ends: list[float] = []
        while True:
            adopted = self._orphan()
            if adopted is not None:
                await self._watch(adopted)
            else:
                await self._spawn()
            self._status.drainer_restarts += 1
            ends = [end for end in ends if end > time.monotonic() - FAILURES_WINDOW_S] + [time.monotonic()]
            if len(ends) > FAILURES_MAX:
                raise DrainerFailed(
                    f"The drainer ended {len(ends)} times within {FAILURES_WINDOW_S:.0f} s.",
                    remedy="See what it writes to the log.",
                )
            await asyncio.sleep(RESTART_S)

    async def _spawn(self) -> None:
        process = await asyncio.create_subprocess_exec(*self._argv, stdin=asyncio.subprocess.DEVNULL)
        self._status.drainer_pid = process.pid
        try:
            await process.wait()
        finally:
            self._status.drainer_pid = None
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
                try:
                    async with asyncio.timeout(STOP_S):
                        await process.wait()
                except TimeoutError:
                    process.kill()
                    await process.wait()

    def _orphan(self) -> int | None:
        """The pid of a drainer of this raw spool that an earlier agent has left."""
        try:
            raw = (self._spool_dir / layout.STATE_FILE).read_bytes()
            pid = int.from_bytes(raw[8 * layout.F_PID : 8 * layout.F_PID + 8], "little")
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            return None
        wanted = [part.encode() for part in self._argv[1:]]
        return pid if command[1 : 1 + len(wanted)] == wanted else None

    async def _watch(self, pid: int) -> None:
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(fd, ended.set)
        self._status.drainer_pid = pid
        try:
            await ended.wait()
        except asyncio.CancelledError:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, signal.SIGTERM)
            raise
        finally:
            self._status.drainer_pid = None
            loop.remove_reader(fd)
            os.close(fd)
