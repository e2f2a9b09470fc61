"""The numbers that the BPF program, the drainer and the reader share. No numpy here: the drainer imports this.

One record in the ring and in the raw spool, 4168 bytes, little-endian:

    0     ring header   u32 length with BUSY (bit 31) and DISCARDED (bit 30), u32 kernel-internal
    8     bio           u64  unique id of the bio for as long as the capture lives
    16    drop_generation u64  the global drop generation when the record was reserved
    24    offset        u64  bytes on the whole disk; any multiple of 4, not of the sector
    32    length        u64  bytes; at most 4096 for data, the whole range for zero and discard
    40    submitted_ns  u64  CLOCK_MONOTONIC
    48    disk          u16  slot
    50    op            u8   journal.extent.Kind
    51    flags         u8   LAST, ABANDONED
    52    reserved      20 bytes
    72    payload       4096 bytes, of which ``length`` mean something

Every record has the same size, so that any span of ring positions that starts at a record is an array.
"""

from __future__ import annotations

ABI_VERSION = 1
"""Of the pinned maps: an agent re-opens a capture only if this is its own."""

PAYLOAD_BYTES = 4096
HEADER_BYTES = 64
RING_HEADER_BYTES = 8
RECORD_BYTES = RING_HEADER_BYTES + HEADER_BYTES + PAYLOAD_BYTES
BUSY = 1 << 31
DISCARDED = 1 << 30

LAST = 1
ABANDONED = 2

BIO_COMPLETE_NS_MAX = 2_000_000_000
"""The program emits all records of a bio in one run with preemption off: microseconds, a millisecond for a megabyte.
A bio that is still incomplete after this long never will be complete."""

GRANULE_BYTES_MIN = 64 << 10
GRANULES_MAX = 1 << 20
"""8 MiB of stamps for a disk: 64 KiB granules up to 64 GiB, 1 MiB at 1 TiB."""

RING_BYTES = 32 << 20
RING_BYTES_MIN = 1 << 18
RING_BYTES_MAX = 1 << 28
"""The kernel's own memory, pinned: beyond 256 MiB the protected machine would notice."""

CHUNK_BYTES = RECORD_BYTES * 4024
"""A file of the raw spool: just under 16 MiB, a whole number of records, so that no record straddles two files."""
SPOOL_CHUNKS_MIN = 2

# --- the spool's state file: a page of u64 fields, then the circular array of marks (monotonic_ns, position) ----------
STATE_FILE = "state"
POKE_FILE = "poke"
LOCK_FILE = "lock"
STATE_MAGIC = 0x4C4F4F5053504443
"""``CDPSPOOL``"""
STATE_VERSION = 1
STATE_HEADER_BYTES = 4096
MARKS = 8192
"""At most 100 marks a second are written: the pipeline may fall 80 s behind before it has to cut more coarsely."""
MARK_BYTES = 16
STATE_BYTES = STATE_HEADER_BYTES + MARKS * MARK_BYTES

F_MAGIC = 0
F_VERSION = 1
F_CAPTURE_ID = 2
F_SPOOL_BYTES = 3
F_PID = 4
"""Of the drainer, as it sees itself."""
F_DRAINED = 5
"""Every record below is in the spool. Written by the drainer after the data."""
F_RELEASED = 6
"""Nobody needs anything below. Written by the reader."""
F_MARK_COUNT = 7
"""Marks ever written; mark n is in place n % MARKS. Written by the drainer after the mark."""
F_PASS_NS = 8
"""CLOCK_MONOTONIC of the drainer's last pass."""
F_STALLED_PASSES = 9
"""Passes that ended because the spool was full or its file system refused: the ring is filling."""
F_REALTIME = 10
"""1 if the drainer got its real-time priority."""


def chunk_start(position: int) -> int:
    """Position of the first record of the chunk that ``position`` lies in."""
    return position - position % CHUNK_BYTES


def chunk_name(start: int) -> str:
    return f"raw-{start:016x}"


def chunk_of_name(name: str) -> int | None:
    """Inverse of ``chunk_name``; None for any other file name."""
    digits = name.removeprefix("raw-")
    if digits == name or len(digits) != 16:
        return None
    try:
        start = int(digits, 16)
    except ValueError:
        return None
    return start if start % CHUNK_BYTES == 0 and chunk_name(start) == name else None
