"""How much is stored, without counting it each time: sums over buckets of consecutive segments.

A bucket is a row of ``tallies`` that changes in the same transaction as the segments that it sums up. A day of one
machine is 85 buckets: what lies behind any position costs some hundred rows to tell, not a row a second.
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cdp.store.records import Entry, Span, generation_key, segment_key

if TYPE_CHECKING:
    from cdp.store.index import Reader, Writer

BUCKET_SEGMENTS: Final = 1024
TABLE: Final = "tallies"
_ROW: Final = struct.Struct("<IQQ")


@dataclass(frozen=True, slots=True)
class Tally:
    """``segment_bytes``: encoded; ``record_bytes``: with what a record adds to that in its file."""

    segments: int = 0
    segment_bytes: int = 0
    record_bytes: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.segments + other.segments,
            self.segment_bytes + other.segment_bytes,
            self.record_bytes + other.record_bytes,
        )

    def __neg__(self) -> Tally:
        return Tally(-self.segments, -self.segment_bytes, -self.record_bytes)


def tally_of(entries: Iterable[Entry]) -> Tally:
    segments = segment_bytes = record_bytes = 0
    for entry in entries:
        segments += 1
        segment_bytes += entry.header.segment_bytes
        record_bytes += entry.record_bytes
    return Tally(segments, segment_bytes, record_bytes)


def added(txn: Writer, machine: uuid.UUID, entries: list[Entry]) -> None:
    """``entries`` become rows in this transaction; none of them was one before."""
    _change(txn, machine, entries, 1)


def removed(txn: Writer, machine: uuid.UUID, entries: list[Entry]) -> None:
    """The rows of ``entries`` go in this transaction."""
    _change(txn, machine, entries, -1)


def everything(txn: Reader, machine: uuid.UUID) -> Tally:
    return sum((_unpack(value) for _, value in txn.scan(TABLE, machine.bytes, machine.bytes)), Tally())


def within(txn: Reader, machine: uuid.UUID, span: Span) -> Tally:
    """What is stored of ``span``: whole buckets from their sums, the rest row by row."""
    first, stop = -(-span.first // BUCKET_SEGMENTS), (span.last + 1) // BUCKET_SEGMENTS
    if first >= stop:
        return _counted(txn, machine, span)
    total = _counted(txn, machine, Span(span.generation, span.first, first * BUCKET_SEGMENTS - 1))
    prefix = generation_key(machine, span.generation)
    for key, value in txn.scan(TABLE, _key(machine, span.generation, first), prefix):
        if int.from_bytes(key[-8:], "big") >= stop:
            break
        total += _unpack(value)
    return total + _counted(txn, machine, Span(span.generation, stop * BUCKET_SEGMENTS, span.last))


def recount(txn: Writer) -> None:
    """Sum up every stored segment: once, for a store of a version that did not."""
    held: list[Entry] = []
    bucket: tuple[uuid.UUID, int, int] | None = None
    for _, value in txn.scan("segments", b"", b""):
        entry = Entry.unpack(value)
        header = entry.header
        own = (header.machine, header.generation, header.seq // BUCKET_SEGMENTS)
        if bucket is not None and own != bucket:
            added(txn, bucket[0], held)
            held = []
        bucket = own
        held.append(entry)
    if bucket is not None:
        added(txn, bucket[0], held)


def _change(txn: Writer, machine: uuid.UUID, entries: list[Entry], sign: int) -> None:
    buckets: dict[tuple[int, int], list[Entry]] = {}
    for entry in entries:
        buckets.setdefault((entry.header.generation, entry.header.seq // BUCKET_SEGMENTS), []).append(entry)
    for (generation, bucket), some in buckets.items():
        key = _key(machine, generation, bucket)
        value = txn.get(TABLE, key)
        change = tally_of(some)
        total = (Tally() if value is None else _unpack(value)) + (change if sign > 0 else -change)
        if total.segments:
            txn.put(TABLE, key, _ROW.pack(total.segments, total.segment_bytes, total.record_bytes))
        else:
            txn.delete(TABLE, key)


def _counted(txn: Reader, machine: uuid.UUID, span: Span) -> Tally:
    """Row by row; ``span`` lies in one bucket or two."""
    if span.first > span.last:
        return Tally()
    found: list[Entry] = []
    start = segment_key(machine, span.generation, span.first)
    for _, value in txn.scan("segments", start, generation_key(machine, span.generation)):
        entry = Entry.unpack(value)
        if entry.header.seq > span.last:
            break
        found.append(entry)
    return tally_of(found)


def _key(machine: uuid.UUID, generation: int, bucket: int) -> bytes:
    return generation_key(machine, generation) + bucket.to_bytes(8, "big")


def _unpack(value: bytes) -> Tally:
    return Tally(*_ROW.unpack(value))
