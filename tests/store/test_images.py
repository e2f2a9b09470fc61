"""Readers, the answers for standbys and resyncs, and recovered files, all against the known image."""

from __future__ import annotations

import random
import subprocess
import uuid
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3

from cdp.store import ImageReader, Store, recover
from cdp.store.errors import PositionFolded, RangeTooLarge, RecoverFailed, UnknownDisk, UnknownPosition
from cdp.store.files import OsFiles
from cdp.store.records import Entry, Span
from cdp.store.resolve import resolve
from cdp.store.runfile import PageCache, RunShelf
from cdp.store.runs import build, find, merge, pack_extents
from cdp.store.versions import Versions
from journal.decoder import decode
from journal.errors import NoRecoveryPoint
from journal.extent import Extents
from journal.position import Position
from journal.segment import Flags, Header
from tests.store.source import SECOND_NS, Source, make

MIB = 1 << 20


def filled(store: Store, seconds: int = 60, seed: int = 1) -> tuple[Source, list[Position]]:
    source = make(store, 4 * MIB, 96 << 10, seed=seed)
    return source, [source.put(store, source.random_writes(30)) for _ in range(seconds)]


def test_any_second_reads_as_it_was(store: Store) -> None:
    source, stored = filled(store)
    source.branch(store, stored[20])
    stored += [source.put(store, source.random_writes(30)) for _ in range(30)]
    choose = random.Random(2)
    for position in choose.sample(stored, 30):
        source.check(store, position)
        expected = source.images[position][0]
        with ImageReader(store, source.machine, position) as image:
            for _ in range(20):
                at = choose.randrange(len(expected))
                length = choose.randrange(len(expected) - at)
                assert image.read(0, at, length) == expected[at : at + length]


class Tables:
    """A history in memory: segments of a few random extents."""

    def __init__(self, count: int) -> None:
        choose = random.Random(7)
        self.all: dict[Position, Extents] = {}
        for seq in range(1, count + 1):
            sectors = sorted(choose.sample(range(512), choose.randrange(6)))
            rows = [(0, 512 * sector, 512, choose.choice([1, 2])) for sector in sectors]
            self.all[Position(1, seq, blake3(seq.to_bytes(8, "big")).digest())] = Extents.from_rows(rows)
        self.read = 0

    def entries(self, span: Span, limit: int) -> list[Entry]:
        positions = [p for p in self.all if span.first <= p.seq <= span.last][:limit]
        return [Entry(_header(position), 1, 0, 0) for position in positions]

    def extents(self, entry: Entry) -> Extents:
        self.read += 1
        return self.all[entry.header.position]

    def digest_at(self, generation: int, seq: int) -> bytes | None:
        return next((p.digest for p in self.all if (p.generation, p.seq) == (generation, seq)), None)

    def written_by(self, last: int) -> list[int]:
        """Per sector, as of segment ``last``."""
        sectors = [0] * 512
        for position, extents in self.all.items():
            if position.seq <= last:
                for _, offset, _, _ in extents.rows():
                    sectors[offset // 512] = position.seq
        return sectors


def _header(position: Position) -> Header:
    machine, nothing = uuid.UUID(int=1), bytes(32)
    numbers = (0, 0, 0, 0, 0, 0, 0, 0)
    return Header(
        machine, position.generation, position.seq, Flags.NONE, *numbers, nothing, nothing, nothing, position.digest
    )


def test_the_index_survives_spilling_merging_damage_and_restarts(tmp_path: Path) -> None:
    tables = Tables(1000)

    def versions() -> Versions:
        shelf = RunShelf(OsFiles(), tmp_path / "runs", uuid.UUID(int=1), PageCache(), tables.digest_at)
        return Versions(tables, shelf, tail_segments_max=12)

    def check(index: Versions, last: int) -> None:
        span = Span(1, 1, last)
        index.catch_up([span])
        seqs: list[int] = []
        for pieces in index.pieces([span], 0, 0, 512 * 512):
            for length, seq in zip(pieces.lengths.tolist(), pieces.seqs.tolist(), strict=True):
                seqs += [seq] * (length // 512)
        assert seqs == tables.written_by(last)

    index = versions()
    for last in (1, 11, 12, 13, 95, 96, 97, 400, 999, 500, 1000, 3):
        check(index, last)
    assert len(list((tmp_path / "runs").iterdir())) < 20
    tables.read = 0
    for last in (1000, 998, 17):
        check(versions(), last)
    assert tables.read <= 3 * 12
    choose = random.Random(9)
    for _ in range(30):
        path = choose.choice(list((tmp_path / "runs").iterdir()))
        raw = bytearray(path.read_bytes())
        raw[choose.randrange(len(raw))] ^= 4
        path.write_bytes(raw)
        check(index if choose.random() < 0.5 else versions(), choose.randrange(1, 1001))
    # Runs of another history are not believed.
    tables.all = {Position(1, p.seq, bytes(32)): Extents.empty() for p in list(tables.all)[:900]}
    check(versions(), 900)


def test_resolve_agrees_with_painting_one_by_one() -> None:
    choose = random.Random(6)
    sectors = 4000
    runs, painted = [], np.zeros((sectors, 2), np.int64)
    for number in range(12):
        tables = []
        for inner in range(5):
            seq = number * 5 + inner + 1
            rows, at = [], 0
            while (at := at + choose.randrange(0, 700)) < sectors - 1:
                length = min(sectors - at, choose.choice([1, 8, 8, 100, 129, 1500]))
                rows.append((3, at * 512, length * 512, choose.choice([1, 2])))
                painted[at : at + length] = seq, rows[-1][3]
                at += length
            keys, values = pack_extents(Extents.from_rows(rows))
            tables.append((Position(1, seq, bytes(32)), keys, values))
        runs.append(build(tables))
    whole = merge([merge(list(runs[:4])), *runs[4:]])
    span = [Span(1, 1, 60)]
    for _ in range(50):
        start = choose.randrange(sectors)
        stop = choose.randrange(start, sectors) + 1
        pieces = resolve(start, stop, [(0, part) for part in find(whole, 3, start, stop, range(1, 61))], span)
        assert int(pieces.lengths.sum()) == (stop - start) * 512
        for offset, length, kind, seq in zip(pieces.offsets, pieces.lengths, pieces.kinds, pieces.seqs, strict=True):
            part = painted[offset // 512 : (offset + length) // 512]
            assert (part[:, 0] == seq).all()
            assert (part[:, 1] == kind).all()


def test_the_image_as_segments(store: Store) -> None:
    source, stored = filled(store)
    with ImageReader(store, source.machine, stored[40]) as image:
        out = bytearray(4 * MIB)
        for at in range(0, 4 * MIB, MIB):
            segment = decode(image.image_segment(0, at, MIB))
            assert segment.header.previous == stored[40].digest and segment.header.seq == 1
            for disk, offset, _, length, data in segment.writes():
                assert disk == 0 and at <= offset and offset + length <= at + MIB and data is not None
                out[offset : offset + length] = data
        assert bytes(out) == source.images[stored[40]][0]


def test_more_than_a_segment_holds_says_what_fits(store: Store) -> None:
    source = make(store, 256 * MIB)
    for n in range(5):
        source.encode([(0, n * 20 * MIB, 20 * MIB, 1)])
        position = next(reversed(source.sealed))
        store.put_segment(source.machine, source.sealed[position][1])
        source.accept(position)
        source.sealed.clear()
        source.images = {position: source.images[position]}
    with ImageReader(store, source.machine, source.position) as image:
        with pytest.raises(RangeTooLarge) as large:
            image.image_segment(0, 0, 256 * MIB)
        assert large.value.fields["fits_bytes"] == 64 * MIB
        assert decode(image.image_segment(0, 0, 64 * MIB)).header.payload_bytes == 64 * MIB
        assert decode(image.image_segment(0, 64 * MIB, 192 * MIB)).header.payload_bytes == 36 * MIB
        with pytest.raises(RangeTooLarge):
            image.read(0, 0, 65 * MIB)


def test_hashes_of_chunks(store: Store) -> None:
    source, stored = filled(store, 6)
    expected = source.images[stored[-1]][0]
    with ImageReader(store, source.machine, stored[-1]) as image:
        for chunk in (4096, 65536, MIB, 3 * MIB):
            digests = image.hashes(0, 65536, 4 * MIB - 65536, chunk)
            for number, at in enumerate(range(65536, 4 * MIB, chunk)):
                piece = expected[at : at + chunk]
                wanted = blake3(piece).digest() if any(piece) else bytes(32)
                assert digests[32 * number : 32 * number + 32] == wanted
        assert image.hashes(1, 0, 0, 4096) == b""


def test_what_cannot_be_asked(store: Store) -> None:
    source, stored = filled(store, 3)
    with ImageReader(store, source.machine, stored[-1]) as image:
        with pytest.raises(UnknownDisk):
            image.read(5, 0, 1)
        with pytest.raises(UnknownDisk):
            image.read(0, 4 * MIB - 1, 2)
        with pytest.raises(ValueError, match="512"):
            image.extents(0, 1, 512)
    with pytest.raises(UnknownPosition):
        ImageReader(store, source.machine, Position(1, 2, bytes(32)))


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_recovered_files_are_the_disk(store: Store, tmp_path: Path, form: str) -> None:
    source, stored = filled(store)
    out = tmp_path / f"disk.{form}"
    out.write_text("an older file")
    seen: list[tuple[int, int]] = []
    recover(
        store,
        source.machine,
        0,
        stored[30],
        out,
        "qcow2" if form == "qcow2" else "raw",
        lambda *step: seen.append(step),
    )
    assert seen[0][0] == 0 and seen[-1][0] == seen[-1][1] > 0
    if form == "qcow2":
        raw = tmp_path / "back.raw"
        subprocess.run(["qemu-img", "convert", "-O", "raw", str(out), str(raw)], check=True)
        out = raw
    assert out.read_bytes() == source.images[stored[30]][0]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_recovery_is_sparse(store: Store, tmp_path: Path) -> None:
    source = make(store, 256 * MIB)
    position = source.put(store, [(0, 128 * MIB, 4096, 1)])
    recover(store, source.machine, 0, position, tmp_path / "disk.raw")
    stat = (tmp_path / "disk.raw").stat()
    assert stat.st_size == 256 * MIB and stat.st_blocks * 512 < MIB


def test_recovery_refuses_what_is_no_recovery_point_and_leaves_nothing_behind(store: Store, tmp_path: Path) -> None:
    source, stored = filled(store, 3)
    fuzzy = source.put(store, [], Flags.FUZZY)
    with pytest.raises(NoRecoveryPoint):
        recover(store, source.machine, 0, fuzzy, tmp_path / "disk.raw")
    with pytest.raises(RecoverFailed):
        recover(store, source.machine, 0, stored[0], tmp_path / "missing" / "disk.raw")
    with pytest.raises(UnknownDisk):
        recover(store, source.machine, 9, stored[0], tmp_path / "disk.raw")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_retention_keeps_the_window_and_respects_who_still_reads(store: Store) -> None:
    source, stored = filled(store, 40)
    machine, now = source.machine, 40 * SECOND_NS
    store.set_cursor(machine, "standby", stored[9])
    held = store.retain(machine, keep_ns=20 * SECOND_NS, now_ns=now)
    assert held.folded_to == str(stored[9]) and held.held_by is not None and held.held_by.name == "standby"
    assert [h.position for h in store.headers_after(machine, stored[9], 2)] == stored[10:12]
    assert store.retain(machine, keep_ns=20 * SECOND_NS, now_ns=now).held_by == held.held_by
    store.set_cursor(machine, "standby", stored[-1])
    with ImageReader(store, machine, stored[12]) as image:
        result = store.retain(machine, keep_ns=20 * SECOND_NS, now_ns=now)
        assert result.folded_to is None and result.held_by is not None and result.held_by.kind == "reader"
        assert image.read(0, 0, 4 * MIB) == source.images[stored[12]][0]
    assert store.retain(machine, keep_ns=20 * SECOND_NS, now_ns=now).folded_to == str(stored[19])
    assert store.position_at(machine, 20 * SECOND_NS) == stored[19]
    for position in stored[19:]:
        source.check(store, position)
    with pytest.raises(PositionFolded):
        store.read_segment(machine, stored[15])
    with pytest.raises(NoRecoveryPoint):
        store.position_at(machine, 19 * SECOND_NS)
    assert not store.contains(machine, stored[18])
    # An open reader goes on while the ground moves under it.
    with ImageReader(store, machine, stored[-1]) as image:
        assert image.read(1, 0, 96 << 10) == source.images[stored[-1]][1]
        store.retain(machine, keep_ns=SECOND_NS, now_ns=now)
        assert image.read(0, 0, 4 * MIB) == source.images[stored[-1]][0]


def test_retention_by_bytes_gives_files_back_for_reuse(tmp_path: Path) -> None:
    with Store.open(tmp_path / "store", file_bytes=256 << 10, spares_max=2) as store:
        source = make(store, MIB)
        sizes = []
        for _ in range(300):
            source.put(store, [(0, 0, 64 << 10, 1)])
            store.retain(source.machine, keep_bytes=MIB)
            sizes.append(sum(path.stat().st_size for path in (tmp_path / "store" / "segments").iterdir()))
        assert max(sizes) <= 2 * MIB
        source.check(store, source.position)
    assert uuid.UUID(str(source.machine))
