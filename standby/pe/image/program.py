"""Run the programs that build images."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from standby.pe.image.errors import ImageBuildFailed, ImageToolMissing


def run(arguments: list[str], *, deadline_s: float, log: Path | None = None) -> None:
    """Run a program to its end; its output goes to ``log`` or, shortened, into the error."""
    if shutil.which(arguments[0]) is None:
        raise ImageToolMissing(
            f"The program {arguments[0]} is not installed.",
            remedy=f"apt-get install {arguments[0]}",
            program=arguments[0],
        )
    try:
        done = subprocess.run(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=deadline_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ImageBuildFailed(
            f"{arguments[0]} did not end within {deadline_s:.0f} s.",
            remedy="Look whether the package mirror answers.",
            program=arguments[0],
        ) from error
    if log is not None:
        log.write_bytes(done.stdout)
    if done.returncode != 0:
        raise ImageBuildFailed(
            f"{arguments[0]} failed with status {done.returncode}.",
            remedy="Its last words say why; the package mirror must be reachable and the disk must have room.",
            program=arguments[0],
            output=done.stdout[-2000:].decode(errors="replace"),
        )
