"""ext4 and XFS: making them, and proving an image sound the way each of them wants it.

Both replay their log when they are mounted, so an image is checked after a mount and an unmount; then the checker must
have nothing to say. A crash image that was never mounted has a log to replay and is not expected to be clean.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from tests.harness.loop import LoopDisk
from tests.harness.mounts import MountNamespace
from tests.harness.process import ProgramFailed, run

FileSystem = Literal["ext4", "xfs"]

MKFS: dict[FileSystem, list[str]] = {
    "ext4": ["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"],
    "xfs": ["mkfs.xfs", "-q", "-f"],
}
MOUNT_OPTIONS: dict[FileSystem, str] = {"ext4": "", "xfs": "nouuid"}
"""A recovered XFS carries the UUID of the mounted original."""
FSCK: dict[FileSystem, list[str]] = {"ext4": ["e2fsck", "-f", "-n"], "xfs": ["xfs_repair", "-n"]}


class ImageUnsound(Exception):
    """The image does not mount, or the checker found something after the log replay."""


def make(kind: FileSystem, device: Path) -> None:
    run([*MKFS[kind], str(device)])


@contextlib.contextmanager
def mounted(kind: FileSystem, images: Sequence[Path], namespace: MountNamespace, under: Path) -> Iterator[list[Path]]:
    """Mount writable images (their logs are replayed) at ``under``/0, /1, …; after the body unmount and fsck each.

    Raises ``ImageUnsound`` if one does not mount or is not clean afterwards. The images are changed.
    """
    disks: list[LoopDisk] = []
    points: list[Path] = []
    try:
        for index, image in enumerate(images):
            disks.append(LoopDisk(image, None))
            try:
                namespace.mount(disks[-1].device, under / str(index), MOUNT_OPTIONS[kind])
            except ProgramFailed as error:
                raise ImageUnsound(f"{image.name} does not mount: {error}") from error
            points.append(under / str(index))
        yield points
    finally:
        for point in reversed(points):
            namespace.unmount(point)
        for disk in disks:
            disk.close()
    for image in images:
        fsck(kind, image)


def fsck(kind: FileSystem, image: Path) -> None:
    """Raises ``ImageUnsound`` with the checker's words."""
    try:
        run([*FSCK[kind], str(image)])
    except ProgramFailed as error:
        raise ImageUnsound(f"{image.name}: {error}") from error
