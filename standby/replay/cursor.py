"""Where replay has to continue after a start.

The target disks hold the source's bytes and nothing else, so the durable cursor lies on the server: it is written after
the disks were flushed (data first, cursor last). Applying is idempotent, so that an older cursor is right too.

    cursor                                               continue with
    none (fresh disks, or somebody else wrote to them)   a seed
    of a generation that is not live                     a seed: the last process may have applied past the parent of
                                                         the live generation without having told
    of the live generation, but a disk is blank where    a seed: the disk was replaced
      the newest image is not
    of the live generation                               the cursor
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np

from journal.position import DIGEST_BYTES, Position
from journal.wire import MachineState
from standby.replay.apply import target_failed
from standby.replay.ports import Disk, Offload, Transport

CHUNK_BYTES = 1 << 20
"""Unit of comparison: small enough to send little too much, large enough to keep the digests small."""
NOTHING = bytes(DIGEST_BYTES)
"""The digest of a chunk that reads as zeros."""


async def resume_from(
    transport: Transport, disks: Mapping[int, Disk], offload: Offload, state: MachineState
) -> Position | None:
    """The position to continue from, or None: seed. Raises ``TargetFailed`` and whatever the transport raises."""
    cursor = await transport.cursor()
    if cursor is None or cursor.generation != state.generation:
        return None
    for source in state.disks:
        disk = disks[source.index]
        length = min(CHUNK_BYTES, source.size_bytes)
        digest = await transport.hashes(source.index, 0, length, CHUNK_BYTES)
        if digest != NOTHING and blank(await offload(partial(_read, disk, length))):
            return None
    return cursor


def _read(disk: Disk, length: int) -> memoryview:
    try:
        return disk.read(0, length)
    except OSError as error:
        raise target_failed(error) from error


def blank(data: memoryview) -> bool:
    """True if all bytes are zero; the length is a multiple of 512."""
    return not np.frombuffer(data, np.uint64).any()
