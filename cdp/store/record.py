"""How a segment lies in a segment file.

    ┌───────────────┐ a multiple of 4096: a later write never touches the physical sector of an acknowledged record
    │ record header │ 128 bytes: the file's tag, whose segment it is, how long, and what was durable before it
    ├───────────────┤ + 128
    │ segment       │ the encoded bytes, unchanged
    ├───────────────┤ + 128 + segment_bytes
    │ frame sums    │ 8 bytes of XXH3 for each payload frame as stored, so that one frame can be read and trusted
    │ sum of sums   │ 8 bytes, over the segment's digest and the frame sums
    ├───────────────┤ zeros up to the next multiple of 4096
    └───────────────┘

The tag is drawn anew each time a file is handed out: whatever an earlier use left in it is invisible. ``synced_to`` is
the end of the last record that was durable when this one was written. A bad record that starts below the largest
``synced_to`` seen behind it had been acknowledged: it has rotted. A bad record with nothing behind it is a torn tail,
never acknowledged, and is cut off.

The sums are against rot; who wrote the segment, and that it is whole, is what its own digests are for. Records of
version 1, which stores of formats 1 and 2 have, sum with blake3. The sum of sums tells which it is.
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt
import xxhash
from blake3 import blake3

from cdp.store.errors import StoredDamage
from cdp.store.files import Buffer, Files, opened
from cdp.store.records import Entry, SegmentFile
from journal.decoder import Segment, decode, unpack_frames, unpack_table
from journal.errors import SegmentDamaged
from journal.extent import Extents
from journal.segment import FRAME_RAW, HEADER_BYTES, SEGMENT_BYTES_MAX, Header

MAGIC: Final = b"CDPRECD\x1a"
VERSION: Final = 2
_VERSIONS: Final = (1, VERSION)
ALIGN_BYTES: Final = 4096
RECORD_HEADER_BYTES: Final = 128
TAG_BYTES: Final = 8
SUM_BYTES: Final = 8
_DIGEST_BYTES: Final = 16
T = TypeVar("T")
SumOf = Callable[[Buffer], bytes]
_HEAD: Final = struct.Struct("<8sHHI8s16sIIQQ32s16x")
assert _HEAD.size + _DIGEST_BYTES == RECORD_HEADER_BYTES


@dataclass(frozen=True, slots=True)
class RecordHeader:
    machine: uuid.UUID
    generation: int
    seq: int
    segment_bytes: int
    frame_count: int
    synced_to: int
    digest: bytes

    @property
    def record_bytes(self) -> int:
        return record_bytes(self.segment_bytes, self.frame_count)

    def pack(self, tag: bytes) -> bytes:
        head = _HEAD.pack(
            MAGIC,
            VERSION,
            0,
            self.segment_bytes,
            tag,
            self.machine.bytes,
            self.generation,
            self.frame_count,
            self.seq,
            self.synced_to,
            self.digest,
        )
        return head + blake3(head).digest(_DIGEST_BYTES)

    @classmethod
    def unpack(cls, raw: Buffer, tag: bytes) -> RecordHeader | None:
        """None unless it is a valid header of the present use of its file."""
        raw = bytes(raw[:RECORD_HEADER_BYTES])
        if len(raw) < RECORD_HEADER_BYTES or not raw.startswith(MAGIC):
            return None
        head = raw[: _HEAD.size]
        if blake3(head).digest(_DIGEST_BYTES) != raw[_HEAD.size :]:
            return None
        _, version, _, segment_bytes, found, machine, generation, frames, seq, synced_to, digest = _HEAD.unpack(head)
        if version not in _VERSIONS or found != tag or not HEADER_BYTES <= segment_bytes <= SEGMENT_BYTES_MAX:
            return None
        return cls(uuid.UUID(bytes=machine), generation, seq, segment_bytes, frames, synced_to, digest)


def record_bytes(segment_bytes: int, frame_count: int) -> int:
    length = RECORD_HEADER_BYTES + segment_bytes + (frame_count + 1) * SUM_BYTES
    return -(-length // ALIGN_BYTES) * ALIGN_BYTES


def pack_record(segment: Segment, tag: bytes, synced_to: int, sums: bytes | None = None) -> list[Buffer]:
    """The buffers of a record, in order; together ``record_bytes`` long. ``sums``: what ``sums_ahead`` gave."""
    header = segment.header
    head = RecordHeader(
        header.machine,
        header.generation,
        header.seq,
        header.segment_bytes,
        header.frame_count,
        synced_to,
        header.digest,
    )
    if sums is None:
        sums = _frame_sums(header, segment.frame_lengths, segment.raw, _sum)
    return [head.pack(tag), segment.raw, _tail(header, sums, _sum)]


def read_segment(files: Files, path: Path, file: SegmentFile, entry: Entry) -> Segment:
    """The whole segment, every digest checked. Raises ``StoredDamage`` and ``OSError``."""
    header = entry.header
    with opened(files, path) as handle:
        raw = files.read(handle, RECORD_HEADER_BYTES + header.segment_bytes, entry.offset)
    head = RecordHeader.unpack(raw, file.tag)
    if head is None or head.digest != header.digest:
        raise _damaged(header, "its record header is bad")
    try:
        segment = decode(memoryview(raw)[RECORD_HEADER_BYTES:])
    except SegmentDamaged as error:
        raise _damaged(header, error.sentence) from error
    if segment.header != header:
        raise _damaged(header, "another segment lies in its place")
    return segment


def check_record(files: Files, path: Path, file: SegmentFile, entry: Entry) -> None:
    """Read and check every byte of a record, the frame sums and the padding included."""
    segment = read_segment(files, path, file, entry)
    with opened(files, path) as handle:
        start = RECORD_HEADER_BYTES + entry.header.segment_bytes
        stored = files.read(handle, entry.record_bytes - start, entry.offset + start)
    if not any(
        stored == _tail(entry.header, _frame_sums(entry.header, segment.frame_lengths, segment.raw, sum_of), sum_of)
        for sum_of in _SUMS
    ):
        raise _damaged(entry.header, "its frame sums are bad")


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Where the frames of one stored segment lie, and what they must hash to. ``starts``: file offsets, one more than
    there are frames."""

    header: Header
    path: Path
    starts: list[int]
    raw: list[bool]
    sums: bytes
    sum_of: SumOf

    def check_frame(self, frame: int, stored: Buffer) -> None:
        if self.sum_of(stored) != self.sums[frame * SUM_BYTES : (frame + 1) * SUM_BYTES]:
            raise _damaged(self.header, f"its payload frame {frame} does not match its checksum")


def read_layout(files: Files, path: Path, entry: Entry) -> Layout:
    """Raises ``StoredDamage`` and ``OSError``."""
    header = entry.header
    with opened(files, path) as handle:
        table = _read_table(files, handle, entry)
        length = (header.frame_count + 1) * SUM_BYTES
        tail = files.read(handle, length, entry.offset + RECORD_HEADER_BYTES + header.segment_bytes)
    sums = tail[:-SUM_BYTES]
    sum_of = next((sum_of for sum_of in _SUMS if sum_of(header.digest + sums) == tail[-SUM_BYTES:]), None)
    if len(tail) != length or sum_of is None:
        raise _damaged(header, "its frame sums are bad")
    first = entry.offset + RECORD_HEADER_BYTES + HEADER_BYTES + header.table_bytes
    frame_lengths = _unpacked(header, unpack_frames, table)
    lengths = [length & ~FRAME_RAW for length in frame_lengths.tolist()]
    raw = [bool(length & FRAME_RAW) for length in frame_lengths.tolist()]
    return Layout(header, path, list(accumulate(lengths, initial=first)), raw, sums, sum_of)


def read_extents(files: Files, path: Path, entry: Entry) -> Extents:
    """The extent table alone. Raises ``StoredDamage`` and ``OSError``."""
    with opened(files, path) as handle:
        return _unpacked(entry.header, unpack_table, _read_table(files, handle, entry))[0]


def _read_table(files: Files, handle: int, entry: Entry) -> bytes:
    header = entry.header
    table = files.read(handle, header.table_bytes, entry.offset + RECORD_HEADER_BYTES + HEADER_BYTES)
    if blake3(table).digest() != header.table_digest:
        raise _damaged(header, "its extent table does not match its digest")
    return table


def _unpacked(header: Header, unpack: Callable[[Header, bytes], T], table: bytes) -> T:
    try:
        return unpack(header, table)
    except SegmentDamaged as error:
        raise _damaged(header, error.sentence) from error


def sums_ahead(header: Header, raw: memoryview) -> bytes:
    """The frame sums of an encoded segment whose payload is being verified elsewhere at this moment. Of use only if
    that succeeds."""
    table = raw[HEADER_BYTES : HEADER_BYTES + header.table_bytes]
    if blake3(table).digest() != header.table_digest:
        return b""
    try:
        return _frame_sums(header, unpack_table(header, table)[1], raw, _sum)
    except SegmentDamaged:
        return b""


def _frame_sums(header: Header, frame_lengths: npt.NDArray[np.uint32], view: memoryview, sum_of: SumOf) -> bytes:
    at = HEADER_BYTES + header.table_bytes
    sums = bytearray()
    for entry in frame_lengths.tolist():
        length = entry & ~FRAME_RAW
        sums += sum_of(view[at : at + length])
        at += length
    return bytes(sums)


def _tail(header: Header, sums: bytes, sum_of: SumOf) -> bytes:
    """What follows the segment in its record, the padding included."""
    tail = sums + sum_of(header.digest + sums)
    whole = record_bytes(header.segment_bytes, header.frame_count)
    return tail.ljust(whole - RECORD_HEADER_BYTES - header.segment_bytes, b"\0")


def _sum(data: Buffer) -> bytes:
    return xxhash.xxh3_64_digest(data)


def _sum_of_version_1(data: Buffer) -> bytes:
    return bytes(blake3(data).digest(SUM_BYTES))


_SUMS: Final[tuple[SumOf, ...]] = (_sum, _sum_of_version_1)


def _damaged(header: Header, why: str) -> StoredDamage:
    return StoredDamage(
        f"Segment {header.generation}/{header.seq} is damaged on the store's disk: {why}.",
        remedy="Check the disk. Recovery points from this one on are lost until a resync has replaced the data.",
        machine=str(header.machine),
        generation=header.generation,
        seq=header.seq,
        sealed_at_ns=header.sealed_at_ns,
    )
