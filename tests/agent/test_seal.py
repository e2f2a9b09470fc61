"""Windows of a raw spool become segments: a bio that is not whole yet waits, and a restart repeats nothing."""

from __future__ import annotations

import random
import time
import uuid
from pathlib import Path

import msgspec
import pytest

from cdp.agent.capture import layout
from cdp.agent.dirty import DirtyMap, Geometry
from cdp.agent.seal import OPEN_NS_MAX, Cut, Sealer
from cdp.agent.spool import Spool
from cdp.agent.state import Cursor
from journal.decoder import decode
from journal.extent import Kind
from journal.position import Position
from journal.segment import Flags
from tests.agent.rawspool import HandWritten

MACHINE = uuid.UUID(int=7)
DISKS = [Geometry(0, 1 << 24, 1 << 16), Geometry(1, 1 << 24, 1 << 16)]


class Bench:
    def __init__(self, directory: Path) -> None:
        self.written = HandWritten(directory / "raw")
        self.spool = Spool(directory / "spool", 64 << 20)
        assert self.spool.open() is None
        self.dirty = DirtyMap(DISKS)
        self.sealer = Sealer(MACHINE, self.spool, self.written.raw)
        self.hurries = random.Random(1)
        self.cursor = Cursor(
            machine=str(MACHINE),
            boot_id="boot",
            capture="capture",
            disks=DISKS,
            tip=str(Position.genesis(MACHINE, 1, None)),
            sealed_at_ns=0,
            raw=0,
            resume=0,
        )

    def seal(
        self, end: int | None = None, *, later_ns: int = 0, final: bool = True
    ) -> dict[tuple[int, int], tuple[Kind, bytes | None]]:
        """Seal up to ``end``; what the segment writes, by disk and offset."""
        cut = Cut(self.written.position, time.monotonic_ns() + later_ns, time.time_ns())
        self.cursor, entry = self.sealer.seal(
            self.cursor,
            self.written.position if end is None else end,
            cut,
            flags=Flags.NONE,
            dirty=self.dirty,
            copier=None,
            final=final,
            hurry=self.hurries.random() < 0.5,
        )
        self.spool.publish(entry)
        segment = decode(entry.path.read_bytes())
        assert segment.header.position == self.cursor.position
        return {
            (disk, offset): (kind, None if data is None else bytes(data))
            for disk, offset, kind, _, data in segment.writes()
        }


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def block(value: int) -> bytes:
    return bytes([value]) * 4096


def test_an_open_bio_waits_for_its_last_record(bench: Bench) -> None:
    bench.written.write(1, 0, block(1), flags=0)
    bench.written.write(2, 8192, block(2))
    assert bench.seal() == {(0, 8192): (Kind.DATA, block(2))}
    assert bench.cursor.open_bios == {1: 0}
    assert bench.written.raw.released == 0
    bench.written.write(3, 8192, block(3))
    end = bench.written.write(1, 4096, block(1))
    # The open bio was submitted before bio 3, but they do not touch.
    assert bench.seal() == {(0, 0): (Kind.DATA, block(1) + block(1) + block(3))}
    assert bench.cursor.open_bios == {}
    assert bench.written.raw.released == end


def test_a_bio_that_stays_open_is_given_up_and_marked(bench: Bench) -> None:
    bench.written.write(1, 1 << 16, block(1), flags=0)
    assert bench.seal() == {}
    assert not bench.dirty
    assert bench.seal(later_ns=2 * OPEN_NS_MAX) == {}
    assert bench.dirty.next_range(0, 0, 1 << 20) == (0, 1 << 16, 1 << 16)
    assert bench.written.raw.released == bench.written.position


def test_a_bio_cut_in_two_by_a_window_of_an_old_backlog_is_not_given_up(bench: Bench) -> None:
    long_ago = time.monotonic_ns() - 100 * OPEN_NS_MAX
    middle = bench.written.write(1, 0, block(1), flags=0, submitted_ns=long_ago)
    bench.written.write(1, 4096, block(2), submitted_ns=long_ago)
    assert bench.seal(middle, final=False) == {}
    assert bench.seal() == {(0, 0): (Kind.DATA, block(1) + block(2))}
    assert not bench.dirty


def test_an_abandoned_bio_is_ignored(bench: Bench) -> None:
    bench.written.write(1, 0, block(1), flags=0)
    bench.written.write(2, 4096, block(2))
    bench.written.write(1, 4096, block(1), flags=layout.ABANDONED | layout.LAST)
    assert bench.seal() == {(0, 4096): (Kind.DATA, block(2))}
    assert bench.cursor.open_bios == {}


def test_discards_and_zeroes_have_no_payload(bench: Bench) -> None:
    bench.written.write(1, 0, None, length=1 << 20, op=Kind.DISCARD, disk=1)
    bench.written.write(2, 4096, None, length=8192, op=Kind.ZERO, disk=1)
    bench.written.write(3, 8192, b"x" * 512, disk=1)
    assert bench.seal() == {
        (1, 0): (Kind.DISCARD, None),
        (1, 4096): (Kind.ZERO, None),
        (1, 8192): (Kind.DATA, b"x" * 512),
        (1, 8704): (Kind.ZERO, None),
        (1, 12288): (Kind.DISCARD, None),
    }


def test_dropping_marks_what_was_there(bench: Bench) -> None:
    bench.written.write(1, 0, block(1), flags=0)
    bench.seal()
    bench.written.write(1, 4096, block(1))
    end = bench.written.write(2, 5 << 16, block(2), disk=1)
    bench.cursor = bench.sealer.drop(bench.cursor, end, bench.dirty)
    assert bench.dirty.next_range(0, 0, 1 << 20) == (0, 0, 1 << 16)
    assert bench.dirty.next_range(1, 0, 1 << 20) == (1, 5 << 16, 1 << 16)
    assert (bench.cursor.raw, bench.cursor.resume, bench.cursor.open_bios) == (end, end, {})
    assert Spool(bench.spool.directory, 1).open() == bench.cursor


def test_any_cuts_and_restarts_give_the_image_of_all_whole_bios(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for run in range(5):
        directory = tmp_path / str(run)
        directory.mkdir()
        bench = Bench(directory)
        model, image = bytearray(1 << 18), bytearray(1 << 18)
        open_bios: dict[int, tuple[int, list[bytes]]] = {}
        for bio in range(1, 60):
            count = rng.choice([1, 1, 1, 2, 5])
            open_bios[bio] = rng.randrange(0, 58) * 4096, [block(rng.randrange(1, 256)) for _ in range(count)]
            at, blocks = open_bios.pop(bio)
            # Another CPU's bio may begin in between, on other blocks: here simply a gap for a cut.
            for number, data in enumerate(blocks):
                last = number == len(blocks) - 1
                bench.written.write(bio, at + number * 4096, data, flags=layout.LAST if last else 0)
                if rng.random() < 0.3:
                    apply(image, bench.seal())
                if rng.random() < 0.1:
                    restart(bench)
            model[at : at + len(blocks) * 4096] = b"".join(blocks)
            if rng.random() < 0.3:
                apply(image, bench.seal())
                assert image == model
        apply(image, bench.seal())
        assert image == model


def apply(image: bytearray, writes: dict[tuple[int, int], tuple[Kind, bytes | None]]) -> None:
    for (_, offset), (_, data) in writes.items():
        assert data is not None
        image[offset : offset + len(data)] = data


def restart(bench: Bench) -> None:
    """The process dies, after having written a segment that the cursor does not know yet."""
    cursor = msgspec.msgpack.decode(msgspec.msgpack.encode(bench.cursor), type=Cursor)
    held = [entry.position for entry in bench.spool.entries]
    bench.spool = Spool(bench.spool.directory, 64 << 20)
    (bench.spool.directory / f"{1:08x}-{1 << 40:016x}.segment").write_bytes(b"torn")
    found = bench.spool.open()
    if held:
        assert found == cursor
        assert [entry.position for entry in bench.spool.entries] == held
        bench.cursor = found
    bench.sealer = Sealer(MACHINE, bench.spool, bench.written.raw)
