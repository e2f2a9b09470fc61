"""The runtime directory, and the agent's own footprint on a machine that is not ours."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path
from typing import Final

from cdp.agent.config import SPOOL_BYTES_MIN, AgentConfig
from cdp.agent.errors import ConfigInvalid

SPOOL_BYTES: Final = 256 << 20
RAW_SPOOL_BYTES: Final = 512 << 20
SLACK_BYTES: Final = 32 << 20
"""Beside the two spools: a chunk file kept for reuse, the cursor, directories."""
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8
_HEAP_KEPT_BYTES: Final = 64 << 20
_MMAP_BYTES: Final = 32 << 20
"""The most that glibc accepts."""


def memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def spool_bytes(config: AgentConfig) -> int:
    """As configured; by default ``SPOOL_BYTES``, but at most an eighth of the memory, for that is where it lies."""
    return config.spool.bytes or max(SPOOL_BYTES_MIN, min(SPOOL_BYTES, memory_bytes() // 8))


def raw_spool_bytes(config: AgentConfig) -> int:
    return config.capture.raw_spool_bytes or max(SPOOL_BYTES_MIN, min(RAW_SPOOL_BYTES, memory_bytes() // 16))


def prepare(config: AgentConfig) -> None:
    """Make the runtime directory, with a tmpfs of its own if so configured. It stays when the agent ends."""
    directory = config.runtime_dir
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not config.mount_tmpfs:
        return
    inside = config.spool.directory is None
    size = raw_spool_bytes(config) + (spool_bytes(config) if inside else 0) + SLACK_BYTES
    options = f"size={size},mode=0700,nosuid,nodev,noexec"
    how = ["-o", f"remount,{options}"] if directory.is_mount() else ["-t", "tmpfs", "-o", options]
    done = subprocess.run(["mount", *how, "cdp", str(directory)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ConfigInvalid(
            f"No tmpfs can be mounted on {directory}: {done.stderr.strip()}.",
            remedy="Run the agent as root, or set mount_tmpfs = false and give runtime_dir room.",
            directory=str(directory),
        )


def unmount(directory: Path) -> None:
    """Give the runtime directory's memory back; for ``cdp agent detach``."""
    if directory.is_mount():
        subprocess.run(["umount", str(directory)], check=True, capture_output=True)


def limit_memory() -> None:
    """One heap for all threads, and the buffers of a segment stay in it: getting them from the kernel each second, page
    by page, was a quarter of the agent's work. What is kept is bounded, and is what a busy second needs anyway."""
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_ARENA_MAX, 1)
    libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
    libc.mallopt(_M_TRIM_THRESHOLD, _HEAP_KEPT_BYTES)
