"""The format: every segment survives the round trip, and no damaged one gets past the decoder."""

from __future__ import annotations

import random
import uuid
from pathlib import Path

import pytest
import zstandard
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from journal.chain import Verdict, check_machine, judge
from journal.decoder import decode
from journal.encoder import Encoder
from journal.errors import (
    CdpError,
    ForeignSegment,
    PositionFork,
    PositionGap,
    SegmentDamaged,
    StaleGeneration,
    UnknownGeneration,
)
from journal.extent import Extents, Kind
from journal.position import Position
from journal.segment import HEADER_BYTES, PAYLOAD_BYTES_MAX, Flags, Header, table_bytes
from journal.wire import raise_remote
from tests.journal.segments import MACHINE, encode_next, random_writes

GENESIS = Position.genesis(MACHINE, 1, None)


@given(seed=st.integers(0, 2**32), count=st.integers(0, 60), flags=st.sampled_from([*Flags, Flags.NONE]))
@settings(max_examples=60, deadline=None)
def test_round_trip(seed: int, count: int, flags: Flags) -> None:
    extents, payload = random_writes(random.Random(seed), 1 << 22, 2, count)
    header, raw = encode_next(GENESIS, extents, payload, flags=flags, second=7)
    segment = decode(raw)
    assert segment.header == header
    assert segment.extents.rows() == extents.rows()
    assert bytes(segment.payload()) == payload
    assert b"".join(bytes(data) for *_, data in segment.writes() if data is not None) == payload
    assert header.is_recovery_point == (flags == Flags.NONE)


def test_payload_chunking_does_not_change_the_bytes() -> None:
    extents, payload = random_writes(random.Random(5), 1 << 22, 1, 50)
    whole = encode_next(GENESIS, extents, payload)[1]
    for size in (1000, 65536, 65537, 200_000):
        chunks = [payload[at : at + size] for at in range(0, len(payload), size)]
        again = Encoder(MACHINE).encode(
            GENESIS, extents, chunks, opened_at_ns=0, sealed_at_ns=0, sealed_monotonic_ns=0
        )[1]
        assert again == whole


def test_every_flipped_byte_is_found() -> None:
    extents, payload = random_writes(random.Random(3), 1 << 16, 2, 6)
    raw = encode_next(GENESIS, extents, payload)[1]
    rng = random.Random(4)
    spots = [*range(HEADER_BYTES), *(rng.randrange(HEADER_BYTES, len(raw)) for _ in range(400))]
    for at in spots:
        damaged = bytearray(raw)
        damaged[at] ^= 1 << rng.randrange(8)
        with pytest.raises(SegmentDamaged):
            decode(damaged)


@given(cut=st.integers(0, 5000), tail=st.binary(max_size=20))
@settings(max_examples=200, deadline=None)
def test_truncated_or_padded_is_found(cut: int, tail: bytes) -> None:
    extents, payload = random_writes(random.Random(3), 1 << 16, 2, 6)
    raw = bytes(encode_next(GENESIS, extents, payload)[1])
    candidate = raw[: min(cut, len(raw))] + tail
    if candidate != raw:
        with pytest.raises(SegmentDamaged):
            decode(candidate)


@given(st.binary(min_size=0, max_size=2000))
@settings(max_examples=200, deadline=None)
def test_random_bytes_never_crash_the_decoder(raw: bytes) -> None:
    with pytest.raises(SegmentDamaged):
        decode(raw)


@pytest.mark.parametrize(
    "rows",
    [
        [(0, 0, 100, Kind.ZERO)],
        [(0, 3, 512, Kind.ZERO)],
        [(0, 0, 0, Kind.ZERO)],
        [(64, 0, 512, Kind.ZERO)],
        [(0, 0, 512, 9)],
        [(0, 0, 1024, Kind.ZERO), (0, 512, 512, Kind.ZERO)],
        [(1, 0, 512, Kind.ZERO), (0, 0, 512, Kind.ZERO)],
        [(0, 2**63, 2**63, Kind.ZERO)],
    ],
)
def test_the_encoder_refuses_a_broken_table(rows: list[tuple[int, int, int, int]]) -> None:
    with pytest.raises(SegmentDamaged):
        encode_next(GENESIS, Extents.from_rows(rows))


def test_the_encoder_refuses_too_much_payload() -> None:
    extents = Extents.from_rows([(0, 0, PAYLOAD_BYTES_MAX + 512, Kind.DATA)])
    with pytest.raises(ValueError, match="more than a segment holds"):
        encode_next(GENESIS, extents)


def test_a_compression_bomb_is_refused_before_it_expands() -> None:
    extents = Extents.from_rows([(0, 0, 4096, Kind.DATA)])
    _, raw = encode_next(GENESIS, extents, bytes(4096))
    bomb = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 20))
    honest = Header.unpack(raw)
    table = bytearray(raw[HEADER_BYTES : HEADER_BYTES + honest.table_bytes])
    table[-4:] = len(bomb).to_bytes(4, "little")
    forged = Header(
        **{
            **{name: getattr(honest, name) for name in Header.__slots__},
            "payload_stored_bytes": len(bomb),
            "table_bytes": table_bytes(1, 1),
            "table_digest": blake3(table).digest(),
            "payload_digest": blake3(bomb).digest(),
        }
    )
    segment = decode(forged.pack() + bytes(table) + bomb)
    with pytest.raises(SegmentDamaged, match="does not expand"):
        segment.payload()


def test_chain_verdicts() -> None:
    first, _ = encode_next(GENESIS, Extents.empty())
    second, _ = encode_next(first.position, Extents.empty(), second=2)
    other, _ = encode_next(first.position, Extents.empty(), second=3)
    known = {1: first.digest, 2: second.digest}
    assert judge(first, GENESIS, known.get) is Verdict.EXTENDS
    assert judge(second, first.position, known.get) is Verdict.EXTENDS
    assert judge(second, second.position, known.get) is Verdict.DUPLICATE
    assert judge(first, second.position, known.get) is Verdict.DUPLICATE
    with pytest.raises(PositionGap):
        judge(second, GENESIS, known.get)
    with pytest.raises(PositionFork):
        judge(other, second.position, known.get)
    third_of_other, _ = encode_next(other.position, Extents.empty())
    with pytest.raises(PositionFork):
        judge(third_of_other, second.position, known.get)
    next_genesis = Position.genesis(MACHINE, 2, second.position)
    with pytest.raises(StaleGeneration):
        judge(third_of_other, next_genesis, known.get)
    newer, _ = encode_next(next_genesis, Extents.empty())
    with pytest.raises(UnknownGeneration):
        judge(newer, second.position, known.get)
    with pytest.raises(ForeignSegment):
        check_machine(first, uuid.uuid4())


def test_positions_print_in_order_and_parse_back() -> None:
    rng = random.Random(1)
    positions = [Position(rng.randrange(1, 300), rng.randrange(2**40), rng.randbytes(32)) for _ in range(200)]
    assert sorted(positions) == [Position.parse(text) for text in sorted(map(str, positions))]
    for text in ("", "1-2-3", "00000000-0000000000000000-" + "0" * 64, str(positions[0]) + "0"):
        with pytest.raises(ValueError):
            Position.parse(text)


def test_errors_keep_their_type_across_the_wire() -> None:
    gap = PositionGap("Segment 7 was sent but 5 is expected.", remedy="Send 5.", seq=7)
    with pytest.raises(PositionGap) as caught:
        raise_remote(gap.as_dict())
    assert caught.value.as_dict() == gap.as_dict()
    with pytest.raises(CdpError, match="odd") as unknown:
        raise_remote({"code": "never-heard-of", "sentence": "odd", "transient": True})
    assert (unknown.value.code, unknown.value.transient) == ("never-heard-of", True)
    with pytest.raises(CdpError) as strange:
        raise_remote({"code": "no\ncode" * 100})
    assert strange.value.code == "remote-error"


def test_the_worked_example_of_the_format_document_is_true() -> None:
    """The hexdump in docs/journal-format.md is this very segment.

    Its payload does not compress, so that the dump does not depend on the version of zstd.
    """
    extents = Extents.from_rows([(0, 4096, 512, Kind.DATA), (0, 8192, 1024, Kind.ZERO)])
    header, raw = encode_next(GENESIS, extents, blake3(b"payload").digest(length=512), second=1)
    dump = "\n".join(
        f"{at:04x}  {' '.join(f'{byte:02x}' for byte in raw[at : at + 16])}" for at in range(0, len(raw), 16)
    )
    document = (Path(__file__).parents[2] / "docs" / "journal-format.md").read_text()
    assert dump in document, dump
    assert header.digest.hex() in document
