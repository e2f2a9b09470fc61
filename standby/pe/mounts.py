"""mount(2) and umount2(2): starting a program for each costs tens of milliseconds of downtime in an emulated PE."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Final

MS_RDONLY: Final = 1
MS_NOATIME: Final = 1024
_MNT_DETACH: Final = 2

_libc = ctypes.CDLL(None, use_errno=True)


def mount(device: Path, directory: Path, kind: str, flags: int, data: str) -> None:
    """Raises ``OSError``."""
    directory.mkdir(parents=True, exist_ok=True)
    source, target = os.fsencode(device), os.fsencode(directory)
    if _libc.mount(source, target, kind.encode(), ctypes.c_ulong(flags), data.encode()) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(device))


def unmount(directory: Path, *, lazily: bool = False) -> None:
    """Raises ``OSError``, EBUSY among others; EINVAL means that nothing was mounted there."""
    if _libc.umount2(os.fsencode(directory), _MNT_DETACH if lazily else 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(directory))
