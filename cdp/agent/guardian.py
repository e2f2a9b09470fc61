"""A process for one application-consistent bookmark: it holds the machine still, and lets it go whatever happens.

    agent                     guardian                        hooks, in their order
    plan (one line of JSON) ► starts them, one by one       ► "ready": prepared, nobody is held up yet
                  "ready"   ◄ file systems written back
    "freeze"                ► "freeze", one by one          ► "frozen"
                  "frozen"  ◄ file systems frozen
    (seals)
    end of file             ► file systems thawed, then
                  "thawed"  ◄ end of file, in reverse       ► let go, exit code 0
                  the end   ◄ one line of JSON: ``End``

The end of file is also what the death of whoever was at the other end looks like, so everybody lets go then: no act of
the agent is needed to thaw. What the plan's ``freeze_s`` bounds is counted here, so that an agent that hangs is no
obstacle either. If the guardian itself is killed, its hooks see an end of file, and the agent thaws the file systems
that it has noted.

Whoever could not hold still for all the time between "frozen" and the end of file is reported: then nothing is known of
the state in between. Standard library only: it starts within a moment, and needs nothing from a frozen disk.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from cdp.agent import fsfreeze

OUTPUT_BYTES_MAX: Final = 4096
"""Of one hook; the rest is read and dropped."""
LET_GO_S: Final = 10.0
"""For a hook to let go; then it is terminated, and killed a little later."""
TERMINATE_S: Final = 2.0
AGENT: Final = 0
"""The descriptor at whose other end the agent is."""


@dataclass
class End:
    """``asked``: held still until the agent said so. ``error``: why not. ``held_s``: from "freeze" to the thaw.
    ``skipped``: file systems that know no freezing; ``stuck``: that could not be thawed."""

    asked: bool = False
    error: str = ""
    held_s: float = 0.0
    outputs: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    stuck: list[str] = field(default_factory=list)


class Failed(Exception):
    """Not held still, and why."""


class Asked(Exception):
    """The agent has closed its end."""


class Hook:
    """One hook's process and what it says."""

    def __init__(self, name: str, argv: list[str], environment: dict[str, str]) -> None:
        self.name = name
        self.words: set[str] = set()
        self.output = bytearray()
        self.ended = False
        self._line = b""
        try:
            self.process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=os.environ | environment,
                start_new_session=True,
            )
        except OSError as error:
            raise Failed(f"the hook {name} cannot be started: {error.strerror}") from None
        assert self.process.stdout is not None and self.process.stdin is not None
        self.out = self.process.stdout.fileno()
        self.into = self.process.stdin

    def read(self) -> None:
        """What it has said since."""
        raw = os.read(self.out, 65536)
        self.ended = not raw
        *lines, self._line = (self._line + raw).split(b"\n")
        if self.ended and self._line:
            lines.append(self._line)
        self._line = self._line[-OUTPUT_BYTES_MAX:]
        for line in lines:
            word = line.decode(errors="replace").strip()
            if word in ("ready", "frozen"):
                self.words.add(word)
            elif len(self.output) < OUTPUT_BYTES_MAX:
                self.output += line[: OUTPUT_BYTES_MAX - len(self.output)] + b"\n"

    @property
    def text(self) -> str:
        return self.output.decode(errors="replace").strip()

    def why(self) -> str:
        """Of one that has ended."""
        try:
            code: int | str = self.process.wait(TERMINATE_S)
        except subprocess.TimeoutExpired:
            code = "none"
        return f"the hook {self.name} ended with exit code {code}: {self.text[-400:] or 'it said nothing'}"

    def freeze(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.into.write(b"freeze\n")
            self.into.flush()

    def let_go(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.into.close()

    def end(self) -> None:
        """By force, with everything that it has started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(TERMINATE_S)
                return


class Guardian:
    def __init__(self, plan: dict[str, Any]) -> None:
        self._plan = plan
        self._hooks: list[Hook] = []
        self._mounts: dict[str, int] = {}
        self._frozen: list[str] = []
        self._began_s: float | None = None
        self._ordered = False
        self.end = End()

    def run(self) -> End:
        try:
            self._prepare(time.monotonic() + self._plan["prepare_s"])
            self._hold()
        except Asked:
            self.end.error = "the agent gave up"
        except Failed as error:
            self.end.error = str(error)
        finally:
            self._let_go()
        self.end.asked = not self.end.error
        return self.end

    # --- becoming still -----------------------------------------------------------------------------------------------
    def _prepare(self, deadline: float) -> None:
        for mount in self._plan["mounts"]:
            try:
                # From now on the file system cannot be unmounted, so a freeze can always be undone.
                self._mounts[mount] = fsfreeze.opened(mount)
            except OSError as error:
                raise Failed(f"{mount} cannot be opened: {error.strerror}") from None
        for name, argv in self._plan["hooks"].items():
            hook = Hook(name, argv, self._plan["environment"])
            self._hooks.append(hook)
            self._wait_word("ready", hook, deadline)
        libc = ctypes.CDLL(None)
        for fd in self._mounts.values():
            libc.syncfs(fd)  # the most of it now, so that little is left for when nobody may write
        if time.monotonic() >= deadline:
            raise Failed(f"writing back the cache took longer than {self._plan['prepare_s']:g} s (prepare_s)")
        say("ready")
        self._wait(lambda: self._ordered, deadline, "the agent did not go on within {prepare_s:g} s (prepare_s)")

    def _hold(self) -> None:
        self._began_s = time.monotonic()
        deadline = self._began_s + self._plan["freeze_s"]
        for hook in self._hooks:
            hook.freeze()
            self._wait_word("frozen", hook, deadline)
        for mount, fd in self._mounts.items():
            try:
                if not fsfreeze.freeze(fd):
                    raise Failed(f"{mount} is frozen by somebody else")
            except OSError as error:
                if error.errno == errno.EOPNOTSUPP and self._plan["automatic"]:
                    self.end.skipped.append(mount)
                    continue
                raise Failed(f"{mount} cannot be frozen: {error.strerror}") from None
            self._frozen.append(mount)
        if time.monotonic() >= deadline:
            raise Failed(f"freezing took longer than {self._plan['freeze_s']:g} s (freeze_s)")
        say("frozen")
        with contextlib.suppress(Asked):
            self._wait(lambda: False, deadline, "the agent did not thaw within {freeze_s:g} s (freeze_s)")

    def _wait_word(self, word: str, hook: Hook, deadline: float) -> None:
        limit = "prepare_s" if word == "ready" else "freeze_s"
        late = f"the hook {hook.name} was not {word} within {{{limit}:g}} s ({limit})"
        self._wait(lambda: word in hook.words, deadline, late)

    def _wait(self, done: Callable[[], bool], deadline: float, late: str) -> None:
        """Until ``done()``. Raises ``Failed`` if that is too late or a hook ends, ``Asked`` if the agent closes its
        end."""
        while not done():
            left = deadline - time.monotonic()
            if left <= 0:
                raise Failed(late.format(**self._plan))
            found, _, _ = select.select([AGENT, *(hook.out for hook in self._hooks)], [], [], left)
            for hook in self._hooks:
                if hook.out in found:
                    hook.read()
                    if hook.ended:
                        raise Failed(hook.why())
            if AGENT in found:
                if not os.read(AGENT, 64):
                    raise Asked
                self._ordered = True

    # --- letting go ---------------------------------------------------------------------------------------------------
    def _let_go(self) -> None:
        """Everything, in reverse order; what goes wrong with one keeps no other."""
        for mount in reversed(self._frozen):
            try:
                if not fsfreeze.thaw(self._mounts[mount]):
                    self._fail(f"{mount} was thawed by somebody else")
            except OSError as error:
                self.end.stuck.append(mount)
                self._fail(f"{mount} cannot be thawed: {error.strerror}")
        for hook in reversed(self._hooks):
            hook.let_go()
        say("thawed")
        for hook in reversed(self._hooks):
            self._see_off(hook)
        if self._began_s is not None:
            self.end.held_s = time.monotonic() - self._began_s
        self.end.outputs = {hook.name: hook.text for hook in self._hooks}

    def _see_off(self, hook: Hook) -> None:
        deadline = time.monotonic() + LET_GO_S
        while not hook.ended and (left := deadline - time.monotonic()) > 0:
            if select.select([hook.out], [], [], left)[0]:
                hook.read()
        with contextlib.suppress(subprocess.TimeoutExpired):
            hook.process.wait(max(0.0, deadline - time.monotonic()))
        if hook.process.returncode is None:
            hook.end()
            self._fail(f"the hook {hook.name} did not let go within {LET_GO_S:g} s and was killed")
        elif hook.process.returncode != 0:
            self._fail(hook.why())

    def _fail(self, why: str) -> None:
        self.end.error = self.end.error or why


def say(word: str) -> None:
    """To the agent, if it still listens."""
    with contextlib.suppress(BrokenPipeError):
        os.write(1, word.encode() + b"\n")


def main() -> None:
    # It ends by its plan: what ends the agent must not leave the machine frozen.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # Not SIG_IGN: the hooks would inherit that.
        signal.signal(number, lambda *_: None)
    raw = b""
    while not raw.endswith(b"\n"):
        got = os.read(AGENT, 65536)
        if not got:
            return
        raw += got
    say(json.dumps(asdict(Guardian(json.loads(raw)).run())))


if __name__ == "__main__":
    main()
