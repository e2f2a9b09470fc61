"""The rows of the index, the keys they are found by, and the values that the store answers with.

Keys sort in the order in which they are read: big-endian, machine first.

    machines      machine                               Machine
    names         name                                  machine
    generations   machine generation                    Generation
    segments      machine generation seq                header (256 bytes), where its record lies
    tallies       machine generation bucket             sums of a bucket of consecutive segments (``tally``)
    times         machine sealed_at_ns generation seq   flags
    files         file number                           SegmentFile
    tails         machine                               Tail: up to where the file has been indexed
    bases         machine                               Base: what retention has folded
    cursors       machine consumer                      Cursor
    bookmarks     machine name                          Bookmark
    rows          table, zero byte, key                 bytes (takeovers, credentials, tokens, settings)
    audit         number                                AuditEntry
"""

from __future__ import annotations

import struct
import uuid
from dataclasses import dataclass
from typing import Final, Literal

import msgspec

from journal.position import Position
from journal.segment import HEADER_BYTES, Flags, Header
from journal.wire import DiskInfo

_WHERE: Final = struct.Struct("<IQI")


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """A protected machine. ``removing`` is set while its segments are being deleted."""

    uuid: uuid.UUID
    name: str
    disks: list[DiskInfo]
    created_at_ns: int
    removing: bool = False

    def disk(self, index: int) -> DiskInfo | None:
        return next((disk for disk in self.disks if disk.index == index), None)


class Generation(msgspec.Struct, frozen=True, kw_only=True):
    """``parent`` is where it starts (printed position), None for all-zero disks."""

    number: int
    parent: str | None
    reason: str
    started_at_ns: int

    @property
    def parent_position(self) -> Position | None:
        return None if self.parent is None else Position.parse(self.parent)

    def genesis(self, machine: uuid.UUID) -> Position:
        return Position.genesis(machine, self.number, self.parent_position)


class SegmentFile(msgspec.Struct, frozen=True, kw_only=True):
    """A preallocated file. ``machine`` is None while it is spare. ``tag`` is drawn anew each time it is handed out, so
    that records of an earlier use are invisible. ``segments`` and ``removed`` count its records once it is full."""

    number: int
    machine: uuid.UUID | None
    tag: bytes
    size_bytes: int
    segments: int | None = None
    removed: int = 0


class Tail(msgspec.Struct, frozen=True, kw_only=True):
    """Records of ``file`` that start below ``end`` are in the index; what follows has to be scanned."""

    file: int
    end: int
    segments: int


class Base(msgspec.Struct, frozen=True, kw_only=True):
    """``folded``: the position whose image the base files hold (None: zeros). ``target``: the position that a fold in
    progress leads to; nothing older is offered any more. ``sealed_at_ns`` belongs to ``target``. ``root``: the first
    generation of the lineage, the one that started on all-zero disks."""

    folded: str | None
    target: str
    sealed_at_ns: int
    root: int

    @property
    def folded_position(self) -> Position | None:
        return None if self.folded is None else Position.parse(self.folded)

    @property
    def target_position(self) -> Position:
        return Position.parse(self.target)


class Cursor(msgspec.Struct, frozen=True, kw_only=True):
    consumer: str
    position: str
    set_at_ns: int


Consistency = Literal["crash", "application"]


class Bookmark(msgspec.Struct, frozen=True, kw_only=True):
    """A named recovery point.

    ``hold``: retention stops here until it is released or removed; without it the bookmark expires with its recovery
    point, and stays listed with ``expired_at_ns``. ``consistent``: the machine's applications were quiesced at this
    point; ``hooks``: what their hooks printed."""

    name: str
    position: str
    sealed_at_ns: int
    created_at_ns: int
    note: str = ""
    consistent: bool = False
    hold: bool = False
    hooks: str = ""
    expired_at_ns: int | None = None

    @property
    def consistency(self) -> Consistency:
        return "application" if self.consistent else "crash"


class AuditEntry(msgspec.Struct, frozen=True, kw_only=True):
    number: int
    at_ns: int
    actor: str
    action: str
    subject: str
    details: dict[str, str]


class RecoveryPoint(msgspec.Struct, frozen=True, kw_only=True):
    position: str
    sealed_at_ns: int


class FuzzyInterval(msgspec.Struct, frozen=True, kw_only=True):
    """No recovery point lies in ``(start_ns, end_ns)``; None: nothing before it is stored, or it is still open."""

    start_ns: int | None
    end_ns: int | None


class History(msgspec.Struct, frozen=True, kw_only=True):
    points: list[RecoveryPoint]
    fuzzy: list[FuzzyInterval]


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What a machine's journal holds: segments, their records' bytes, and the bytes of the files that they lie in.
    ``recoverable_from_ns``: the oldest recovery point. ``recent_bytes`` of records were stored in the last
    ``recent_ns``, at most a day, the first seed left out: today's rate."""

    segments: int
    segment_bytes: int
    file_bytes: int
    oldest_ns: int | None
    newest_ns: int | None
    recoverable_from_ns: int | None = None
    recent_bytes: int = 0
    recent_ns: int = 0


@dataclass(frozen=True, slots=True)
class Entry:
    """A stored segment: its header and where its record lies."""

    header: Header
    file: int
    offset: int
    record_bytes: int

    def pack(self) -> bytes:
        return self.header.pack() + _WHERE.pack(self.file, self.offset, self.record_bytes)

    @staticmethod
    def record_bytes_of(value: bytes) -> int:
        """That field alone of a packed entry."""
        return int(_WHERE.unpack_from(value, HEADER_BYTES)[2])

    @classmethod
    def unpack(cls, value: bytes) -> Entry:
        return cls(Header.unpack(value[:HEADER_BYTES]), *_WHERE.unpack(value[HEADER_BYTES:]))


@dataclass(frozen=True, slots=True)
class Span:
    """Segments ``first <= seq <= last`` of one generation. A lineage is a list of spans, the oldest first."""

    generation: int
    first: int
    last: int

    def __contains__(self, position: object) -> bool:
        return (
            isinstance(position, Position)
            and position.generation == self.generation
            and self.first - 1 <= position.seq <= self.last
        )


def generation_key(machine: uuid.UUID, generation: int) -> bytes:
    return machine.bytes + generation.to_bytes(4, "big")


def segment_key(machine: uuid.UUID, generation: int, seq: int) -> bytes:
    return machine.bytes + struct.pack(">IQ", generation, seq)


def time_key(machine: uuid.UUID, header: Header) -> bytes:
    return machine.bytes + struct.pack(">QIQ", header.sealed_at_ns, header.generation, header.seq)


def time_bound(machine: uuid.UUID, time_ns: int) -> bytes:
    """Sorts after every key of an earlier time and before every key of ``time_ns``."""
    return machine.bytes + struct.pack(">Q", max(0, min(time_ns, 2**64 - 1)))


@dataclass(frozen=True, slots=True)
class Instant:
    """A row of ``times``."""

    sealed_at_ns: int
    generation: int
    seq: int
    flags: Flags

    @classmethod
    def unpack(cls, key: bytes, value: bytes) -> Instant:
        sealed_at_ns, generation, seq = struct.unpack(">QIQ", key[16:])
        return cls(sealed_at_ns, generation, seq, Flags(value[0]))

    @property
    def is_recovery_point(self) -> bool:
        return self.flags == Flags.NONE
