"""Stopping the writers of a planned takeover, and starting them again.

    mode         quiesce                              undo
    postgresql   checkpoint, stop the unit, sync      start the unit
    freeze       FIFREEZE each configured mount       FITHAW, in reverse
    hooks        ``before`` as configured, sync       ``after`` as configured
    none         –                                    –

What was done is noted in the runtime directory *before* it is done, so that an agent that is restarted in between can
undo it; that directory is never on a frozen file system. Nobody stays quiesced for longer than the lease that came with
the order: a server that disappears in the middle of a takeover must not leave the source stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from cdp.agent import fsfreeze
from cdp.agent.config import QuiesceConfig
from cdp.agent.errors import HookFailed
from cdp.agent.state import Mode, write_file

UNDO_S: Final = 60.0
"""For a service to start; it is not waited for any longer."""
OUTPUT_CHARS_MAX: Final = 400


class Quiesced(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``until_ns``: CLOCK_MONOTONIC; the note does not survive the boot that this clock counts."""

    mode: Mode
    until_ns: int


class Quiescer:
    """Idempotent both ways. One call at a time."""

    def __init__(self, config: QuiesceConfig, runtime_dir: Path) -> None:
        self._config = config
        self._note = runtime_dir / "quiesced.json"
        self._lock = asyncio.Lock()

    @property
    def noted(self) -> Quiesced | None:
        try:
            return msgspec.json.decode(self._note.read_bytes(), type=Quiesced)
        except FileNotFoundError:
            return None

    async def quiesce(self, mode: Mode, deadline_s: float, lease_s: float) -> None:
        """Raises ``HookFailed``, with everything undone."""
        async with self._lock:
            note = Quiesced(mode=mode, until_ns=time.monotonic_ns() + int(lease_s * 1e9))
            write_file(self._note, msgspec.json.encode(note), durable=False)
            try:
                async with asyncio.timeout(deadline_s):
                    await self._do(mode)
            except (TimeoutError, HookFailed) as error:
                await self._undo(mode)
                self.forget()
                if isinstance(error, HookFailed):
                    raise
                raise HookFailed(
                    f"Quiescing ({mode}) took longer than {deadline_s:.0f} s.",
                    remedy="Look at what keeps it from stopping, or raise the deadline. The source goes on as before.",
                    mode=mode,
                ) from None

    async def undo(self, mode: Mode | None = None) -> None:
        """Undo what is noted (or ``mode``, which a fence remembers across a reboot)."""
        async with self._lock:
            noted = self.noted
            mode = mode or (None if noted is None else noted.mode)
            if mode is not None:
                await self._undo(mode)
            self.forget()

    async def thaw_only(self) -> None:
        """Let frozen file systems go, so that a fence can be written down; stopped services stay stopped."""
        async with self._lock:
            noted = self.noted
            if noted is not None and noted.mode == "freeze":
                await self._undo("freeze")

    def forget(self) -> None:
        self._note.unlink(missing_ok=True)

    async def _do(self, mode: Mode) -> None:
        match mode:
            case "postgresql":
                if self._config.postgresql_checkpoint:
                    await run(self._config.postgresql_checkpoint)
                # Twice: while the service still runs, so that little is left for the one that counts as downtime.
                await asyncio.to_thread(os.sync)
                # Debian's postgresql.service only stands for its instances (postgresql@15-main): they are stopped with
                # it, but a stop of it alone does not wait for them, and what they commit meanwhile would be lost.
                unit = self._config.postgresql_unit.removesuffix(".service")
                await run(["systemctl", "stop", f"{unit}.service", f"{unit}@*.service"])
                # What other programs have written and not synced belongs to the machine, too.
                await asyncio.to_thread(os.sync)
            case "freeze":
                for mount in self._config.freeze:
                    await asyncio.to_thread(_freeze, mount)
            case "hooks":
                await run(self._config.before)
                await asyncio.to_thread(os.sync)
            case "none":
                pass

    async def _undo(self, mode: Mode) -> None:
        match mode:
            case "postgresql":
                await run(["systemctl", "start", self._config.postgresql_unit], UNDO_S)
            case "freeze":
                for mount in reversed(self._config.freeze):
                    await asyncio.to_thread(_thaw, mount)
            case "hooks":
                await run(self._config.after, UNDO_S)
            case "none":
                pass


async def run(argv: list[str], deadline_s: float | None = None) -> None:
    """Run a command to its end; an empty one does nothing. Raises ``HookFailed`` with the end of its output; kills it
    when cancelled or late."""
    if not argv:
        return
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
    except OSError as error:
        raise _hook_failed(argv, str(error)) from error
    try:
        async with asyncio.timeout(deadline_s):
            output, _ = await process.communicate()
    except (TimeoutError, asyncio.CancelledError) as error:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        if isinstance(error, TimeoutError):
            raise _hook_failed(argv, f"it did not end within {deadline_s} s") from None
        raise
    if process.returncode != 0:
        text = output.decode(errors="replace").strip()[-OUTPUT_CHARS_MAX:]
        raise _hook_failed(argv, f"exit code {process.returncode}: {text}")


def _hook_failed(argv: list[str], why: str) -> HookFailed:
    return HookFailed(
        f"{argv[0]} failed: {why}.", remedy="Run it by hand on the source; see [quiesce] in agent.toml.", command=argv
    )


def _freeze(mount: Path) -> None:
    _change(mount, fsfreeze.freeze)


def _thaw(mount: Path) -> None:
    _change(mount, fsfreeze.thaw)


def _change(mount: Path, how: Callable[[int], bool]) -> None:
    try:
        fd = fsfreeze.opened(mount)
        try:
            how(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise HookFailed(
            f"{mount} cannot be frozen or thawed: {error.strerror}.",
            remedy="[quiesce] freeze must name mount points of file systems that support it.",
            mount=str(mount),
        ) from error
