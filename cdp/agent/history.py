"""How a history begins, and whether one that is at hand may go on. Pure functions of values.

    cursor at hand?  same machine, boot, capture, disks    then
    yes              yes                                   CONTINUE where it ends
    otherwise, by the server's tip:
      the genesis, and nothing was laid below it           SEED: copy everything, leave zeros out
      anything else                                        COMPARE: read everything, send what differs

When a fence is lifted, the new generation may stand on exactly what this side had sealed: then only what was written
since has to be copied, which is what the dirty marks say.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from cdp.agent.dirty import DirtyMap, Geometry, Round
from cdp.agent.errors import DiskChanged
from cdp.agent.state import Cursor
from journal.position import Position
from journal.wire import DiskInfo

Key = tuple[str, str, str]
"""Machine, boot, capture: a cursor means something only under the same three."""


def may_continue(cursor: Cursor, key: Key, disks: Sequence[Geometry]) -> bool:
    """Disks that were added at the end are no obstacle: they become dirty."""
    known = cursor.disks == list(disks[: len(cursor.disks)])
    return known and (cursor.machine, cursor.boot_id, cursor.capture) == key


def new_disks(cursor: Cursor, disks: Sequence[Geometry]) -> list[int]:
    return [disk.index for disk in disks[len(cursor.disks) :]]


def first_round(
    machine: uuid.UUID,
    tip: Position,
    drop_generation: int,
    reason: str,
    disks: Sequence[Geometry],
    *,
    prefilled: bool = False,
) -> Round:
    """The copy that a history on ``tip`` begins with, when nothing is known of what the disks hold. ``prefilled``: the
    image at the first genesis is not known to be zeros."""
    todo = DirtyMap(disks)
    todo.mark_all()
    empty = tip == Position.genesis(machine, tip.generation, None)
    return Round(
        kind="seed" if empty and not prefilled else "compare",
        reason="seed" if empty else reason,
        drop_generation=drop_generation,
        todo=todo.pack(),
        complete=True,
        total_bytes=sum(disk.size_bytes for disk in disks),
    )


def first_cursor(key: Key, disks: list[Geometry], tip: Position, raw: int, current: Round) -> Cursor:
    """At the beginning of a history: nothing is sealed, ``current`` copies everything."""
    machine, boot_id, capture = key
    return Cursor(
        machine=machine,
        boot_id=boot_id,
        capture=capture,
        disks=disks,
        tip=str(tip),
        sealed_at_ns=0,
        raw=raw,
        resume=raw,
        dealt=current.drop_generation,
        round=current,
    )


def stands_on(machine: uuid.UUID, tip: Position, ours: Position) -> bool:
    """Is ``tip`` the genesis of a generation whose parent is ``ours``?"""
    return tip == Position.genesis(machine, tip.generation, ours)


def check_disks(disks: Sequence[Geometry], known: Sequence[DiskInfo]) -> None:
    """Raise ``DiskChanged`` if a disk of ours is smaller than the server knows it. A larger one is no obstacle: the
    server learns its size from our Hello."""
    sizes = {disk.index: disk.size_bytes for disk in known}
    for disk in disks:
        if sizes.get(disk.index, disk.size_bytes) > disk.size_bytes:
            raise DiskChanged(
                f"Disk {disk.index} has {disk.size_bytes} bytes; its history was begun with {sizes[disk.index]}.",
                remedy="Give it its old size, or protect the machine anew: 'cdp machines remove', then join it again.",
                disk=disk.index,
                size_bytes=disk.size_bytes,
                known_bytes=sizes[disk.index],
            )
