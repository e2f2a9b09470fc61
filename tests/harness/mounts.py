"""A private mount namespace: what a proof mounts is seen by nobody else, and is gone when its holder is.

A mount made in the host's namespace is copied into every namespace that another program makes meanwhile, and pins
the device there long after the test has unmounted it.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.harness.process import Program, ProgramFailed, run
from tests.harness.wait import wait_until


class MountNamespace:
    """Commands run inside by prefixing ``prefix``; files are read by programs that run inside, not by the test."""

    def __init__(self, log_dir: Path, name: str = "mounts") -> None:
        self._holder = Program(
            name,
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", "echo ready; exec sleep infinity"],
            log_dir,
        )
        self._log = log_dir / f"{name}.log"
        self._mounted: list[Path] = []

    def __enter__(self) -> Self:
        self._holder.start()
        wait_until(lambda: "ready" in self._log.read_text(), 10, "the mount namespace")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for target in reversed(self._mounted):
            with contextlib.suppress(ProgramFailed):
                self.run(["umount", "--lazy", str(target)])
        self._holder.kill_for_good()

    @property
    def holder_pid(self) -> int:
        """``/proc/PID/root`` leads inside."""
        return self._holder.pid

    @property
    def prefix(self) -> list[str]:
        return ["nsenter", f"--mount=/proc/{self._holder.pid}/ns/mnt"]

    def run(self, argv: list[str], *, deadline_s: float = 60.0) -> str:
        return run([*self.prefix, *argv], deadline_s=deadline_s)

    def read(self, path: Path) -> bytes:
        """A file as the namespace sees it."""
        return Path(f"/proc/{self._holder.pid}/root{path}").read_bytes()

    def mount(self, device: Path, target: Path, options: str = "") -> None:
        target.mkdir(parents=True, exist_ok=True)
        self.run(["mount", *(["-o", options] if options else []), str(device), str(target)])
        self._mounted.append(target)

    def unmount(self, target: Path) -> None:
        """Writes everything back first: when it returns, the device holds the file system's last state."""
        self.run(["umount", str(target)])
        self._mounted.remove(target)
