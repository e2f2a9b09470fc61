"""A record whose payload and extent table are whole is written anew from them: the digests in the index prove it.

segment header, record header, frame sums, padding damaged    written anew, synced
a crash in between                                            they are damaged still, or good
"""

from __future__ import annotations

import uuid

from cdp.store.damage import Damage
from cdp.store.files import opened
from cdp.store.record import RECORD_HEADER_BYTES, pack_record
from cdp.store.store import Store
from journal.decoder import decode
from journal.errors import SegmentDamaged
from journal.position import Position
from journal.segment import HEADER_BYTES


def mend(store: Store, machine: uuid.UUID, damage: Damage) -> bool:
    """True if the damaged record is good again. Raises ``OSError`` if it cannot be written."""
    if damage.kind != "segment" or damage.position is None:
        return False
    position = Position.parse(damage.position)
    state = store.state(machine)
    # Nobody may recycle the file meanwhile.
    with state.writing:
        entry = store.entry(state, position.generation, position.seq)
        file = None if entry is None else store.pool.row(entry.file)
        if entry is None or file is None or file.machine != machine or entry.header.position != position:
            return False
        with opened(store.files, store.pool.path(entry.file), write=True) as handle:
            stored = store.files.read(handle, entry.header.segment_bytes, entry.offset + RECORD_HEADER_BYTES)
            try:
                # The index has the same header, under a checksum of its own.
                segment = decode(entry.header.pack() + stored[HEADER_BYTES:])
            except SegmentDamaged:
                return False
            if segment.header != entry.header:
                return False
            # What was durable when it was first written is everything before it.
            store.files.write(handle, pack_record(segment, file.tag, entry.offset), entry.offset)
            store.files.sync(handle)
    return True
