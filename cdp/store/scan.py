"""What lies behind the last indexed record of a file? Run once per machine at start.

at the scan position                                   verdict
────────────────────────────────────────────────────   ─────────────────────────────────────────────────
a whole record that extends the chain                  it was durable, perhaps acknowledged: index it
a whole record that does not extend the chain          a leftover: end of the tail
anything else, nothing valid behind it                 a torn tail, never acknowledged: cut off
anything else, behind it a record whose ``synced_to``  rot: it had been acknowledged and is lost; the history ends
lies past the scan position                            before it, and the machine needs a resync
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from cdp.store.files import Files
from cdp.store.record import ALIGN_BYTES, MAGIC, RECORD_HEADER_BYTES, RecordHeader
from cdp.store.records import Entry, SegmentFile
from journal.chain import Verdict, judge
from journal.decoder import decode
from journal.errors import CdpError, SegmentDamaged
from journal.position import Position

_WINDOW_BYTES: Final = 16 << 20


@dataclass(frozen=True, slots=True)
class Scanned:
    """``entries`` extend the tip, in order. ``lost_from``: the seq of an acknowledged segment that has rotted."""

    entries: list[Entry]
    end: int
    lost_from: int | None


def scan_tail(files: Files, handle: int, file: SegmentFile, start: int, tip: Position) -> Scanned:
    """Scan ``file`` from ``start`` on; ``tip`` is the last indexed position of its machine. Raises ``OSError``."""
    entries: list[Entry] = []
    at = start
    while at + ALIGN_BYTES <= file.size_bytes:
        found = _record_at(files, handle, file, at)
        if found is None:
            lost = any(head.synced_to > at for head in _headers_behind(files, handle, file, at))
            return Scanned(entries, at, tip.seq + 1 if lost else None)
        try:
            if found.header.machine != file.machine or judge(found.header, tip, lambda _: None) is not Verdict.EXTENDS:
                break
        except CdpError:
            break
        entries.append(found)
        tip = found.header.position
        at += found.record_bytes
    return Scanned(entries, at, None)


def _record_at(files: Files, handle: int, file: SegmentFile, at: int) -> Entry | None:
    head = RecordHeader.unpack(files.read(handle, RECORD_HEADER_BYTES, at), file.tag)
    if head is None or at + head.record_bytes > file.size_bytes:
        return None
    raw = files.read(handle, head.segment_bytes, at + RECORD_HEADER_BYTES)
    try:
        header = decode(raw).header
    except SegmentDamaged:
        return None
    if header.digest != head.digest or header.frame_count != head.frame_count:
        return None
    return Entry(header, file.number, at, head.record_bytes)


def _headers_behind(files: Files, handle: int, file: SegmentFile, at: int) -> Iterator[RecordHeader]:
    """Every valid record header that starts behind ``at``."""
    for window in range(at + ALIGN_BYTES, file.size_bytes, _WINDOW_BYTES):
        data = files.read(handle, min(_WINDOW_BYTES, file.size_bytes - window), window)
        found = data.find(MAGIC)
        while found >= 0:
            if found % ALIGN_BYTES == 0:
                head = RecordHeader.unpack(data[found : found + RECORD_HEADER_BYTES], file.tag)
                if head is not None:
                    yield head
            found = data.find(MAGIC, found + 1)
