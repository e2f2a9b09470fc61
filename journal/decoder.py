"""Bytes -> a verified segment.

Nothing is yielded before the digests hold, and no length is used before it is bounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import zstandard
from blake3 import blake3

from journal.errors import SegmentDamaged
from journal.extent import Extents, Kind
from journal.segment import FRAME_BYTES, FRAME_RAW, HEADER_BYTES, Header, damaged

_Scalar = TypeVar("_Scalar", bound=np.generic)


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """A segment whose every byte has been verified. ``raw`` is the encoded form, unchanged."""

    header: Header
    extents: Extents
    frame_lengths: npt.NDArray[np.uint32]
    raw: memoryview

    def payload(self) -> bytearray:
        """All payload, decompressed: ``header.payload_bytes`` bytes. Raises ``SegmentDamaged``."""
        out = bytearray(self.header.payload_bytes)
        at = 0
        for frame in self.frames():
            out[at : at + len(frame)] = frame
            at += len(frame)
        return out

    def frames(self) -> Iterator[bytes | memoryview]:
        """The payload in pieces of ``FRAME_BYTES``, the last one shorter."""
        # One decompressor per call: the object is not thread-safe.
        decompressor = zstandard.ZstdDecompressor()
        stored_at = HEADER_BYTES + self.header.table_bytes
        left = self.header.payload_bytes
        for entry in self.frame_lengths.tolist():
            length = entry & ~FRAME_RAW
            stored = self.raw[stored_at : stored_at + length]
            want = min(FRAME_BYTES, left)
            yield stored if entry & FRAME_RAW else expand(decompressor, stored, want)
            stored_at += length
            left -= want

    def writes(self) -> Iterator[tuple[int, int, Kind, int, memoryview | None]]:
        """``(disk, offset, kind, length, bytes or None)`` for each extent, in table order."""
        payload = memoryview(self.payload())
        at = 0
        for disk, offset, length, kind in self.extents.rows():
            if kind == Kind.DATA:
                yield disk, offset, Kind.DATA, length, payload[at : at + length]
                at += length
            else:
                yield disk, offset, Kind(kind), length, None


def decode(raw: bytes | bytearray | memoryview) -> Segment:
    """Verify every digest, bound and invariant of one whole segment. Raises ``SegmentDamaged``."""
    view = memoryview(raw).cast("B")
    header = Header.unpack(view)
    if len(view) != header.segment_bytes:
        raise damaged(f"The segment should have {header.segment_bytes} bytes but has {len(view)}.")
    table = view[HEADER_BYTES : HEADER_BYTES + header.table_bytes]
    if blake3(table).digest() != header.table_digest:
        raise damaged("The extent table does not match its digest.")
    if blake3(view[HEADER_BYTES + header.table_bytes :]).digest() != header.payload_digest:
        raise damaged("The payload does not match its digest.")
    extents, frame_lengths = unpack_table(header, table)
    return Segment(header, extents, frame_lengths, view)


def unpack_table(header: Header, table: memoryview | bytes) -> tuple[Extents, npt.NDArray[np.uint32]]:
    """The columns of a table whose digest has been checked, as views into it, and checked against the header."""
    count = header.extent_count
    at = 0

    def column(dtype: type[_Scalar], items: int) -> npt.NDArray[_Scalar]:
        nonlocal at
        values = np.frombuffer(table, dtype, items, at)
        at += values.nbytes
        return values

    extents = Extents(
        offsets=column(np.uint64, count),
        lengths=column(np.uint64, count),
        disks=column(np.uint16, count),
        kinds=column(np.uint8, count),
    )
    extents.check()
    if extents.payload_bytes != header.payload_bytes:
        raise damaged("The extents and the payload have different lengths.")
    return extents, unpack_frames(header, table)


def unpack_frames(header: Header, table: memoryview | bytes) -> npt.NDArray[np.uint32]:
    """The last column alone: the frames' lengths, of a table whose digest has been checked."""
    frame_lengths = np.frombuffer(table, np.uint32, header.frame_count, len(table) - 4 * header.frame_count)
    stored = frame_lengths & np.uint32(FRAME_RAW - 1)
    if int(stored.sum(dtype=np.uint64)) != header.payload_stored_bytes or (stored > FRAME_BYTES).any():
        raise damaged("The frames and the stored payload have different lengths.")
    return frame_lengths


def expand(decompressor: zstandard.ZstdDecompressor, stored: bytes | memoryview, want: int) -> bytes:
    """One compressed frame, which must expand to exactly ``want`` bytes."""
    try:
        # The frame states its own size: refuse a bomb before any memory is spent on it.
        if zstandard.frame_content_size(stored) != want:
            raise SegmentDamaged("A frame does not expand to its length.", remedy="Fetch the segment again.")
        frame: bytes = decompressor.decompress(stored, max_output_size=want)
    except zstandard.ZstdError as error:
        raise SegmentDamaged(f"A frame does not decompress: {error}.", remedy="Fetch the segment again.") from error
    if len(frame) != want:
        raise SegmentDamaged("A frame does not expand to its length.", remedy="Fetch the segment again.")
    return frame


def expand_into(decompressor: zstandard.ZstdDecompressor, stored: bytes | memoryview, out: memoryview) -> None:
    """The same into a buffer, which the frame must fill exactly."""
    try:
        # The frame states its own size, and the buffer bounds what is made of it.
        whole = zstandard.frame_content_size(stored) == len(out)
        with decompressor.stream_reader(stored) as reader:
            done = 0
            while whole and done < len(out) and (got := reader.readinto(out[done:])):
                done += got
    except zstandard.ZstdError as error:
        raise SegmentDamaged(f"A frame does not decompress: {error}.", remedy="Fetch the segment again.") from error
    if not whole or done != len(out):
        raise SegmentDamaged("A frame does not expand to its length.", remedy="Fetch the segment again.")
