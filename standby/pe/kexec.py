"""Loading the replicated kernel beside the running one, and starting it."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from standby.pe.errors import KexecFailed
from standby.pe.kernel import Kernel

_LOAD_S_MAX: Final = 120.0
_EXECUTE_S_MAX: Final = 30.0
_LOADED: Final = Path("/sys/kernel/kexec_loaded")
COMMAND_LINE_BYTES_MAX: Final = 2048
"""x86 kernels cut longer ones off."""


def load(kernel: Kernel, initrd: bytes, command_line: str) -> None:
    """Replaces what was loaded. Raises ``KexecFailed``; then nothing is loaded.

    ``-c``, ``-i``: the older system call, because only it can leave out the checksum that the new kernel's loader
    computes over everything before it starts; without hardware virtualisation that is 0.15 s of downtime per MB.
    """
    if len(command_line) >= COMMAND_LINE_BYTES_MAX:
        raise KexecFailed(
            f"The kernel arguments are longer than {COMMAND_LINE_BYTES_MAX} bytes.",
            remedy="Shorten the kernel arguments in the source's boot loader.",
        )
    with tempfile.TemporaryDirectory(prefix="kexec-") as scratch:
        image, initial = Path(scratch, "kernel"), Path(scratch, "initrd")
        image.write_bytes(kernel.image)
        initial.write_bytes(initrd)
        form = ["--type=elf-x86_64", "--args-linux"] if kernel.unpacked else []
        arguments = [f"--initrd={initial}", f"--command-line={command_line}"]
        _kexec(["-c", "-i", "-l", str(image), *form, *arguments], _LOAD_S_MAX)


def is_loaded() -> bool:
    return _LOADED.exists() and _LOADED.read_text().strip() == "1"


def execute() -> None:
    """Start what was loaded. Returns only by raising ``KexecFailed``. Nothing may be mounted that is to be kept."""
    os.sync()
    _kexec(["-e"], _EXECUTE_S_MAX)
    raise KexecFailed("kexec returned.", remedy="See the console log of the standby's domain.")


def _kexec(arguments: list[str], deadline_s: float) -> None:
    try:
        subprocess.run(
            ["kexec", *arguments],
            check=True,
            capture_output=True,
            text=True,
            timeout=deadline_s,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.CalledProcessError as error:
        raise KexecFailed(
            f"kexec failed: {error.stderr.strip() or error.stdout.strip() or error.returncode}.",
            remedy="The standby may have too little memory for a second kernel; see the console log of its domain.",
        ) from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KexecFailed(f"kexec failed: {error}.", remedy="Build the PE again with 'cdp pe build'.") from error
