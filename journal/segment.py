"""The binary layout of a segment, format version 1. ``docs/journal-format.md`` tells it byte by byte.

    ┌────────────────┐ 0
    │ header         │ 256 bytes, ends in the digest of everything before it
    ├────────────────┤ 256
    │ extent table   │ columns: offsets u64[n] · lengths u64[n] · disks u16[n] · kinds u8[n], zero-padded to 8 bytes
    │ frame table    │ stored length u32[f]; bit 31 set: the frame is stored as it is, not compressed
    ├────────────────┤ 256 + table_bytes
    │ payload frames │ each at most 64 KiB of payload, an independent zstd frame
    └────────────────┘ 256 + table_bytes + payload_stored_bytes

The header holds the blake3 digests of both following parts, so its own digest, which is the segment's digest and the
next segment's ``previous``, vouches for every byte. All integers are little-endian.
"""

from __future__ import annotations

import struct
import uuid
from dataclasses import dataclass
from enum import IntFlag

from blake3 import blake3

from journal.errors import SegmentDamaged
from journal.position import DIGEST_BYTES, GENERATION_MAX, SEQ_MAX, Position

MAGIC = b"CDPJSEG\x1a"
VERSION = 1
HEADER_BYTES = 256
FRAME_BYTES = 64 << 10
"""Payload per frame: 4 KiB frames lose half of the compression, larger ones make random access dear."""
PAYLOAD_BYTES_MAX = 64 << 20
"""Payload of one segment before compression. A second with more becomes several segments, all but the last flagged
``CONTINUES``; this is what bounds the memory of every process that holds a segment."""
EXTENTS_MAX = 1 << 18
FRAMES_MAX = PAYLOAD_BYTES_MAX // FRAME_BYTES
FRAME_RAW = 1 << 31
SEGMENT_BYTES_MAX = HEADER_BYTES + EXTENTS_MAX * 19 + 8 + FRAMES_MAX * 4 + PAYLOAD_BYTES_MAX
"""An incompressible frame is stored raw, so a segment never exceeds this."""

_HEADER = struct.Struct("<8sHHI16sQQQQQIIQQQ32s32s32s24x32s")
assert _HEADER.size == HEADER_BYTES


class Flags(IntFlag):
    """A segment without either flag ends in a recovery point."""

    NONE = 0
    FUZZY = 1
    """A seed or resync has not caught up: the state at the end of this segment is not one the disks ever had."""
    CONTINUES = 2
    """The second goes on in the next segment; the state in between is not offered."""


@dataclass(frozen=True, slots=True)
class Header:
    """The first 256 bytes. Times are nanoseconds; ``sealed_at_ns`` since the Unix epoch by the source's clock."""

    machine: uuid.UUID
    generation: int
    seq: int
    flags: Flags
    opened_at_ns: int
    sealed_at_ns: int
    sealed_monotonic_ns: int
    extent_count: int
    frame_count: int
    table_bytes: int
    payload_bytes: int
    payload_stored_bytes: int
    previous: bytes
    table_digest: bytes
    payload_digest: bytes
    digest: bytes

    @property
    def position(self) -> Position:
        return Position(self.generation, self.seq, self.digest)

    @property
    def is_recovery_point(self) -> bool:
        return not self.flags & (Flags.FUZZY | Flags.CONTINUES)

    @property
    def segment_bytes(self) -> int:
        return HEADER_BYTES + self.table_bytes + self.payload_stored_bytes

    def pack(self) -> bytes:
        """The header's bytes, with ``digest`` computed afresh (the field's value is ignored)."""
        packed = _HEADER.pack(
            MAGIC,
            VERSION,
            self.flags,
            HEADER_BYTES,
            self.machine.bytes,
            self.generation,
            self.seq,
            self.opened_at_ns,
            self.sealed_at_ns,
            self.sealed_monotonic_ns,
            self.extent_count,
            self.frame_count,
            self.table_bytes,
            self.payload_bytes,
            self.payload_stored_bytes,
            self.previous,
            self.table_digest,
            self.payload_digest,
            bytes(DIGEST_BYTES),
        )
        body = packed[:-DIGEST_BYTES]
        return body + blake3(body).digest()

    @classmethod
    def unpack(cls, raw: bytes | bytearray | memoryview) -> Header:
        """Parse and check 256 bytes: magic, version, digest, then every bound. Raises ``SegmentDamaged``."""
        if len(raw) < HEADER_BYTES:
            raise damaged(f"A segment has at least {HEADER_BYTES} bytes, this one has {len(raw)}.")
        raw = bytes(raw[:HEADER_BYTES])
        fields = _HEADER.unpack(raw)
        magic, version, flags, header_bytes = fields[:4]
        if magic != MAGIC:
            raise damaged("The magic number is not that of a segment.")
        if version != VERSION or header_bytes != HEADER_BYTES:
            raise SegmentDamaged(
                f"Segment format version {version} is not known here (known: {VERSION}).",
                remedy="Upgrade the reader to the version of the writer.",
                version=version,
            )
        if blake3(raw[:-DIGEST_BYTES]).digest() != raw[-DIGEST_BYTES:]:
            raise damaged("The header does not match its digest.")
        header = cls(uuid.UUID(bytes=fields[4]), fields[5], fields[6], Flags(flags), *fields[7:])
        header._check()
        return header

    def _check(self) -> None:
        limits = (
            ("generation", self.generation, 1, GENERATION_MAX),
            ("seq", self.seq, 1, SEQ_MAX),
            ("flags", int(self.flags), 0, int(Flags.FUZZY | Flags.CONTINUES)),
            ("extent count", self.extent_count, 0, EXTENTS_MAX),
            ("frame count", self.frame_count, -(-self.payload_bytes // FRAME_BYTES), FRAMES_MAX),
            ("frame count", self.frame_count, 0, -(-self.payload_bytes // FRAME_BYTES)),
            ("payload length", self.payload_bytes, 0, PAYLOAD_BYTES_MAX),
            ("stored payload length", self.payload_stored_bytes, 0, self.payload_bytes),
            ("table length", self.table_bytes, self._table_bytes(), self._table_bytes()),
        )
        for what, value, low, high in limits:
            if not low <= value <= high:
                raise damaged(f"The {what} {value} is outside {low}..{high}.")

    def _table_bytes(self) -> int:
        return table_bytes(self.extent_count, self.frame_count)


def table_bytes(extent_count: int, frame_count: int) -> int:
    """Bytes of extent table (padded to 8) and frame table together."""
    return -(-extent_count * 19 // 8) * 8 + frame_count * 4


def damaged(sentence: str) -> SegmentDamaged:
    return SegmentDamaged(sentence, remedy="Fetch or send it again; if it repeats, run a resync of the machine.")
