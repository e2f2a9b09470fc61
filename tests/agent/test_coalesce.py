"""The last writer of each byte wins: against a model that applies records to an array one after another."""

from __future__ import annotations

import time
import uuid

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cdp.agent.coalesce import Pieces, copy_pieces, gather, last_writers
from cdp.agent.intervals import Intervals, key, keys
from journal.decoder import decode
from journal.encoder import Encoder
from journal.extent import SECTOR_BYTES, Kind
from journal.position import Position

DISK_SECTORS = 64
RECORD_SECTORS = 8

Record = tuple[int, int, int, int]
"""disk, first sector, sectors, kind"""

records_of = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.integers(0, DISK_SECTORS - 1),
        st.integers(1, RECORD_SECTORS),
        st.sampled_from([Kind.DATA, Kind.DATA, Kind.DATA, Kind.ZERO, Kind.DISCARD]),
    ).map(lambda r: (r[0], r[1], min(r[2] if r[3] == Kind.DATA else r[2] * 6, DISK_SECTORS - r[1]), int(r[3]))),
    max_size=40,
)


def columns(records: list[Record]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    disks = np.array([record[0] for record in records], np.uint16)
    starts = keys(disks, np.array([record[1] * SECTOR_BYTES for record in records], np.uint64))
    lengths = np.array([record[2] * SECTOR_BYTES for record in records], np.uint64)
    return starts, starts + lengths, np.array([record[3] for record in records], np.uint8)


def model(records: list[Record]) -> dict[tuple[int, int], int]:
    """(disk, sector) -> number of the record that wrote it last."""
    owner = {}
    for number, (disk, sector, count, _) in enumerate(records):
        for at in range(sector, sector + count):
            owner[disk, at] = number
    return owner


def owners(pieces: Pieces) -> dict[tuple[int, int], int]:
    found: dict[tuple[int, int], int] = {}
    for start, end, source in zip(pieces.starts.tolist(), pieces.ends.tolist(), pieces.sources.tolist(), strict=True):
        for at in range(start, end, SECTOR_BYTES):
            where = (at >> 50, (at & (2**50 - 1)) // SECTOR_BYTES)
            assert where not in found
            found[where] = source
    return found


@given(records_of)
@settings(max_examples=400, deadline=None)
def test_every_sector_belongs_to_its_last_writer(records: list[Record]) -> None:
    pieces = last_writers(*columns(records))
    assert owners(pieces) == model(records)
    pieces.extents().check()
    for start, kind, source, offset in zip(
        pieces.starts.tolist(),
        pieces.kinds.tolist(),
        pieces.sources.tolist(),
        pieces.source_offsets.tolist(),
        strict=True,
    ):
        disk, sector, _, record_kind = records[source]
        assert kind == record_kind
        assert start == key(disk, sector * SECTOR_BYTES) + offset


def payloads(records: list[Record]) -> np.ndarray:
    """Every sector of every record is filled with values of its own."""
    out = np.zeros((len(records), 4096), np.uint8)
    for number in range(len(records)):
        for sector in range(8):
            out[number, sector * 512 : (sector + 1) * 512] = (number * 8 + sector) % 251
    return out


@given(records_of, st.integers(1, 7))
@settings(max_examples=200, deadline=None)
def test_payload_follows_the_extents(records: list[Record], batch_rows: int) -> None:
    payload = payloads(records)
    pieces = last_writers(*columns(records))
    batches = [payload[at : at + batch_rows] for at in range(0, len(records), batch_rows)]
    raw = b"".join(bytes(part) for part in gather(pieces, batches, np.zeros(0, np.uint8)))
    owner = model(records)
    at = 0
    for disk, offset, length, kind in pieces.extents().rows():
        if kind != Kind.DATA:
            continue
        for sector in range(offset // 512, (offset + length) // 512):
            number = owner[disk, sector]
            want = (number * 8 + sector - records[number][1]) % 251
            assert raw[at : at + 512] == bytes([want]) * 512
            at += 512
    assert at == len(raw) == pieces.extents().payload_bytes


def test_pieces_off_the_sector_grid_within_one_bio() -> None:
    # A user's buffer that is not aligned: the bio is whole sectors, its records are not.
    starts = np.array([0, 1000, 3000], np.uint64)
    ends = np.array([1000, 3000, 4096], np.uint64)
    pieces = last_writers(starts, ends, np.full(3, Kind.DATA, np.uint8))
    assert pieces.extents().rows() == [(0, 0, 4096, Kind.DATA)]
    payload = np.arange(3, dtype=np.uint8)[:, None].repeat(4096, axis=1)
    raw = b"".join(bytes(part) for part in gather(pieces, [payload], np.zeros(0, np.uint8)))
    assert raw == bytes([0]) * 1000 + bytes([1]) * 2000 + bytes([2]) * 1096


def test_copies_rank_below_what_was_captured() -> None:
    captured = last_writers(np.array([4096], np.uint64), np.array([8192], np.uint64), np.array([Kind.DATA], np.uint8))
    chunk = Intervals(np.array([0], np.uint64), np.array([16384], np.uint64))
    zeros = Intervals(np.array([12288], np.uint64), np.array([16384], np.uint64))
    ranges = chunk.minus(Intervals(captured.starts, captured.ends))
    copies = copy_pieces(ranges, zeros, np.array([0], np.uint64), np.array([0], np.int64))
    both = captured.with_copies(copies)
    assert both.extents().rows() == [(0, 0, 12288, Kind.DATA), (0, 12288, 4096, Kind.ZERO)]
    copied = np.full(16384, 7, np.uint8)
    raw = b"".join(bytes(part) for part in gather(both, [np.full((1, 4096), 9, np.uint8)], copied))
    assert raw == bytes([7]) * 4096 + bytes([9]) * 4096 + bytes([7]) * 4096


def test_many_overlapping_discards_stay_cheap() -> None:
    # 4,000 whole-disk discards with a small write between each: quadratic work would take minutes here.
    rows: list[Record] = []
    for number in range(2000):
        rows += [(0, 0, 1 << 20, Kind.DISCARD), (0, number, 1, Kind.DATA)]
    pieces = last_writers(*columns(rows))
    assert len(pieces) == 3
    assert (pieces.kinds == Kind.DATA).sum() == 1


def test_it_encodes() -> None:
    records: list[Record] = [(0, 0, 8, Kind.DATA), (0, 4, 8, Kind.DATA), (1, 0, 40, Kind.DISCARD)]
    machine = uuid.uuid4()
    pieces = last_writers(*columns(records))
    _, raw = Encoder(machine).encode(
        Position.genesis(machine, 1, None),
        pieces.extents(),
        gather(pieces, [payloads(records)], np.zeros(0, np.uint8)),
        opened_at_ns=0,
        sealed_at_ns=time.time_ns(),
        sealed_monotonic_ns=0,
    )
    writes = {(disk, offset): data for disk, offset, _, _, data in decode(raw).writes()}
    data = writes[0, 0]
    assert data is not None and len(data) == 12 * 512
