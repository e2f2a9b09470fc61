"""What lies on a block device: told by its magic number, as far as a root file system can be made of it."""

from __future__ import annotations

import os
import struct
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_HEAD_BYTES: Final = 4096
_EXT_SUPERBLOCK: Final = 1024
READ_ONLY: Final = {"ext4": "noload", "xfs": "norecovery,nouuid"}
"""Options that keep a read-only mount from writing: the journal is not replayed."""
READ_WRITE: Final = {"ext4": "", "xfs": "nouuid"}
MODULES: Final = {"ext4": ("ext4",), "xfs": ("xfs",)}
"""Kernel modules that a mount needs, named as modprobe knows them."""


@dataclass(frozen=True, slots=True)
class Filesystem:
    """``kind``: ``ext4`` (ext2 and ext3 as well: one driver serves them) or ``xfs``."""

    device: Path
    kind: str
    uuid: str
    label: str


def probe(device: Path) -> Filesystem | None:
    head = _head(device)
    if head[_EXT_SUPERBLOCK + 56 : _EXT_SUPERBLOCK + 58] == b"\x53\xef":
        identity, label = struct.unpack_from("16s16s", head, _EXT_SUPERBLOCK + 104)
        return Filesystem(device, "ext4", str(uuid.UUID(bytes=identity)), _text(label))
    if head[:4] == b"XFSB":
        identity, label = struct.unpack_from("16s", head, 32)[0], head[108:120]
        return Filesystem(device, "xfs", str(uuid.UUID(bytes=identity)), _text(label))
    return None


def is_lvm(device: Path) -> bool:
    """Is it a physical volume of LVM? The label may lie in any of the first four sectors."""
    head = _head(device)
    return any(head[at : at + 8] == b"LABELONE" for at in range(0, 2048, 512))


def _head(device: Path) -> bytes:
    fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(fd, _HEAD_BYTES, 0).ljust(_HEAD_BYTES, b"\0")
    finally:
        os.close(fd)


def _text(label: bytes) -> str:
    return label.rstrip(b"\0").decode(errors="replace")
