"""Holding the machine still for an application-consistent bookmark: what to freeze, and the guardian that does it.

Three reins, so that nothing stays frozen: the guardian's own clock, the end of file that it sees when this process
dies, and a note in the runtime directory. The note is written before anything is frozen; whoever finds it without a
guardian at work (this agent, or the next one) thaws what it names.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import msgspec

from cdp.agent import fsfreeze
from cdp.agent.capture.devices import disks_under
from cdp.agent.config import BookmarkConfig
from cdp.agent.errors import HookFailed, NothingToFreeze
from cdp.agent.guardian import LET_GO_S, TERMINATE_S, End
from cdp.agent.state import write_file

log = logging.getLogger(__name__)

SHIPPED: Final = Path(__file__).with_name("hooks")
ANSWER_BYTES_MAX: Final = 1 << 20
MARGIN_S: Final = 2.0
_REMEDY: Final = "The machine goes on as before. See [bookmark] in agent.toml and 'Bookmarks' in the operations guide."


class Note(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    mounts: list[str]


class Freezer:
    """``disks``: the protected ones, as ``(major, minor)``. One bookmark at a time."""

    def __init__(self, config: BookmarkConfig, runtime_dir: Path, disks: set[tuple[int, int]]) -> None:
        self._config = config
        self._runtime_dir = runtime_dir
        self._disks = disks
        self._note = runtime_dir / "frozen.json"
        self._one = asyncio.Lock()

    @asynccontextmanager
    async def prepared(self, label: str) -> AsyncIterator[Guarded]:
        """Everything is ready to be frozen; whatever was frozen is thawed when the block ends. Raises ``HookFailed``
        and ``NothingToFreeze``."""
        async with self._one:
            plan = self._plan(label)
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "cdp.agent.guardian"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=ANSWER_BYTES_MAX,
                start_new_session=True,
            )
            guarded = Guarded(process, self._config, self._note, plan["mounts"])
            try:
                await guarded.start(plan)
                yield guarded
            finally:
                await guarded.close()

    async def enforce(self) -> None:
        """Thaw what an agent or a guardian that was killed has left frozen."""
        if self._one.locked() or not self._note.exists():
            return
        note = msgspec.json.decode(self._note.read_bytes(), type=Note)
        log.error("a bookmark was left over: thawing %s", ", ".join(note.mounts) or "nothing")
        await thaw_all(self._note, note.mounts)

    def _plan(self, label: str) -> dict[str, Any]:
        config = self._config
        automatic = config.freeze is None
        mounts = mounts_on(self._disks) if config.freeze is None else config.freeze
        hooks = {name: _command(name, config.hook_dir) for name in config.hooks}
        if not hooks and not mounts:
            raise NothingToFreeze(
                "This machine has no hook and no file system to freeze: its bookmarks are crash-consistent.",
                remedy="Name hooks or mount points under [bookmark] in its agent.toml, or leave --application out.",
            )
        runtime = self._runtime_dir.stat().st_dev
        for mount in mounts:
            if mount.exists() and mount.stat().st_dev == runtime:
                raise HookFailed(
                    f"{mount} holds the agent's own runtime directory: freezing it would stop the agent.",
                    remedy="Leave it out of freeze, or give runtime_dir a tmpfs.",
                    mount=str(mount),
                )
        environment = {"CDP_BOOKMARK": label, "CDP_FREEZE_S": str(max(1, round(config.freeze_s)))}
        return {
            "hooks": hooks,
            "mounts": [str(mount) for mount in mounts],
            "automatic": automatic,
            "environment": config.environment | environment,
            "prepare_s": config.prepare_s,
            "freeze_s": config.freeze_s,
        }


class Guarded:
    """A guardian at work."""

    def __init__(
        self, process: asyncio.subprocess.Process, config: BookmarkConfig, note: Path, mounts: list[str]
    ) -> None:
        assert process.stdin is not None and process.stdout is not None
        self._process = process
        self._into, self._out = process.stdin, process.stdout
        self._config = config
        self._note = note
        self._mounts = mounts
        self._end: End | None = None
        self._thawed = False
        self._noted = False

    async def start(self, plan: dict[str, Any]) -> None:
        self._into.write(msgspec.json.encode(plan) + b"\n")
        await self._expect("ready", self._config.prepare_s)

    async def freeze(self) -> None:
        """On return the machine holds still, for at most ``freeze_s`` since this call."""
        self._noted = True
        write_file(self._note, msgspec.json.encode(Note(mounts=self._mounts)), durable=False)
        self._into.write(b"freeze\n")
        await self._expect("frozen", self._config.freeze_s)

    async def thaw(self) -> str:
        """What the hooks said. Raises ``HookFailed`` if the machine has not held still until this call."""
        await self.close()
        end = self._end
        if end is None or not end.asked:
            raise _failed("the guardian was killed" if end is None else end.error, end)
        said = [f"{name}: {line}" for name, text in end.outputs.items() for line in text.splitlines()]
        frozen = [mount for mount in self._mounts if mount not in end.skipped]
        said.append(f"frozen for {end.held_s:.2f} s: {', '.join([*end.outputs, *frozen])}")
        if end.skipped:
            said.append(f"written back, cannot be frozen: {', '.join(end.skipped)}")
        return "\n".join(said)

    async def close(self) -> None:
        """Thaw. The end of file is sent at once, whatever becomes of the waiting that follows."""
        self._into.close()
        hooks = len(self._config.hooks)
        thaws = await self._reads_on(lambda: self._thawed, self._config.freeze_s)
        if not thaws or not await self._reads_on(lambda: self._end is not None, hooks * (LET_GO_S + 2 * TERMINATE_S)):
            self._process.kill()  # it hangs; its hooks see the end of file
        await self._process.wait()
        if self._noted:
            if self._end is None or self._end.stuck:
                log.error("the guardian of a bookmark ended before it had thawed everything")
                await thaw_all(self._note, self._mounts)
            self._note.unlink(missing_ok=True)
            self._noted = False

    async def _reads_on(self, done: Callable[[], bool], within_s: float) -> bool:
        """Until ``done()`` or the end of its output; False if that takes too long."""
        try:
            async with asyncio.timeout(within_s + MARGIN_S):
                # It may have ended by its own clock: what it said is there all the same.
                while not done() and (line := await self._out.readline()):
                    self._take(line)
        except TimeoutError:
            return False
        return True

    async def _expect(self, word: str, within_s: float) -> None:
        with contextlib.suppress(ConnectionError):
            await self._into.drain()
        try:
            # It counts the same time, and says more.
            async with asyncio.timeout(within_s + MARGIN_S):
                line = await self._out.readline()
        except TimeoutError:
            self._process.kill()  # its hooks see the end of file, and let go
            raise _failed("the guardian hangs", None) from None
        if line.decode().strip() == word:
            return
        self._take(line)
        await self.close()  # for its last words
        raise _failed("the guardian was killed" if self._end is None else self._end.error, self._end)

    def _take(self, line: bytes) -> None:
        self._thawed = self._thawed or line == b"thawed\n"
        if line.startswith(b"{"):
            self._end = msgspec.json.decode(line, type=End)


async def thaw_all(note: Path, mounts: list[str]) -> None:
    """Directly, without a guardian; then the note is done with."""
    for mount in reversed(mounts):
        try:
            if await asyncio.to_thread(fsfreeze.thaw_path, Path(mount)):
                log.warning("thawed %s", mount)
        except OSError as error:
            # A mount point that is gone cannot be frozen any more, nor can what knows no freezing.
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EOPNOTSUPP, errno.ENOTTY):
                raise _failed(f"{mount} cannot be thawed: {error.strerror}", None) from error
    note.unlink(missing_ok=True)


def mounts_on(disks: set[tuple[int, int]]) -> list[Path]:
    """Writable file systems that lie on these disks, each at one of its mount points, the last mounted first."""
    found: dict[str, Path] = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        head, _, tail = line.partition(" - ")
        _, _, device, _, point, options, *_ = head.split()
        _, source, super_options = tail.split(maxsplit=2)
        if device in found or "ro" in options.split(",") or "ro" in super_options.split(","):
            continue
        major, minor = (int(number) for number in device.split(":"))
        if major == 0 and Path(source).is_block_device():  # an anonymous device number, as btrfs has it
            number = Path(source).stat().st_rdev
            major, minor = os.major(number), os.minor(number)
        if disks_under(major, minor) & disks:
            found[device] = Path(point.encode().decode("unicode_escape"))
    return list(reversed(found.values()))


def _command(name: str, hook_dir: Path) -> list[str]:
    """The administrator's hook of that name, or else the shipped one."""
    own = hook_dir / name
    if not own.exists():
        if not (SHIPPED / name).exists():
            raise HookFailed(
                f"There is no hook {name!r}: neither in {hook_dir} nor among those that are shipped.",
                remedy="Write it, or correct hooks under [bookmark] in agent.toml.",
                hook=name,
            )
        # Installing may have lost the permission to execute it.
        return ["/bin/sh", str(SHIPPED / name)]
    status = own.stat()
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
        raise HookFailed(
            f"{own} can be changed by others than root, so it is not run.",
            remedy=f"chown root {own}; chmod go-w {own}",
            hook=name,
        )
    return [str(own)]


def _failed(why: str, end: End | None) -> HookFailed:
    outputs = {} if end is None else end.outputs
    return HookFailed(f"There is no application-consistent bookmark: {why}.", remedy=_REMEDY, outputs=outputs)
