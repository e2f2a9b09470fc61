"""Raw spool: what the drainer's writer writes is what the reader reads, whatever is killed in between."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from cdp.agent.capture import layout
from cdp.agent.capture.drain import SpoolWriter
from cdp.agent.capture.errors import SpoolMissing, SpoolRangeGone
from cdp.agent.capture.layout import CHUNK_BYTES, MARKS, RECORD_BYTES
from cdp.agent.capture.record import RECORD, Records
from cdp.agent.capture.spool import Mark, RawSpool

CAPTURE = 4711


def records(first: int, count: int) -> Records:
    made = np.zeros(count, RECORD)
    made["bio"] = np.arange(first, first + count)
    made["payload"][:, 0] = made["bio"] & 0xFF
    return made


def put(writer: SpoolWriter, made: Records) -> int:
    """As the drainer does it: data first, cursor last."""
    position = int(made["bio"][0]) * RECORD_BYTES
    raw = memoryview(made.tobytes())
    while raw:
        part = raw[: layout.chunk_start(position) + CHUNK_BYTES - position]
        # Split anywhere: that is where the ring wraps.
        writer.write(position, [part[:1000], part[1000:]])
        position += len(part)
        raw = raw[len(part) :]
    writer.fields[layout.F_DRAINED] = max(writer.fields[layout.F_DRAINED], position)
    return position


def numbers(spool: RawSpool, start: int, end: int) -> list[int]:
    return [int(number) for batch in spool.read(start, end) for number in batch["bio"]]


def test_names_of_chunks() -> None:
    for start in (0, CHUNK_BYTES, 12345 * CHUNK_BYTES):
        assert layout.chunk_of_name(layout.chunk_name(start)) == start
    for name in ("raw-", "raw-0", "raw-000000000000000g", "raw-0000000000000001", "state", "raw--000000000000001"):
        assert layout.chunk_of_name(name) is None


def test_records_across_chunks(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path, CAPTURE, 1 << 30, 0)
    count = CHUNK_BYTES // RECORD_BYTES
    end = put(writer, records(0, 2 * count + 5))
    spool = RawSpool.open(tmp_path, CAPTURE)
    assert spool.drained == end
    assert numbers(spool, 0, end) == list(range(2 * count + 5))
    assert numbers(spool, (count - 1) * RECORD_BYTES, (count + 1) * RECORD_BYTES) == [count - 1, count]
    assert all(batch.nbytes <= RECORD_BYTES * 7 for batch in spool.read(0, end, RECORD_BYTES * 7 + 1))
    spool.close()


def test_discarded_records_are_skipped(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path, CAPTURE, 1 << 30, 0)
    made = records(0, 5)
    made["ring_length"][2] = layout.DISCARDED | 4160
    end = put(writer, made)
    assert numbers(RawSpool.open(tmp_path, CAPTURE), 0, end) == [0, 1, 3, 4]


def test_ranges_that_are_not_there(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path, CAPTURE, 1 << 30, 0)
    end = put(writer, records(0, 10))
    spool = RawSpool.open(tmp_path, CAPTURE)
    spool.release(3 * RECORD_BYTES)
    for start, stop in ((0, end), (end, end + RECORD_BYTES), (5 * RECORD_BYTES + 1, end), (end, 4 * RECORD_BYTES)):
        with pytest.raises(SpoolRangeGone):
            list(spool.read(start, stop))
    for position in (2 * RECORD_BYTES, end + RECORD_BYTES):
        with pytest.raises(SpoolRangeGone):
            spool.release(position)


def test_spools_of_other_captures(tmp_path: Path) -> None:
    with pytest.raises(SpoolMissing):
        RawSpool.open(tmp_path, CAPTURE)
    (tmp_path / layout.STATE_FILE).write_bytes(b"torn")
    with pytest.raises(SpoolMissing):
        RawSpool.open(tmp_path, CAPTURE)
    put(SpoolWriter(tmp_path, CAPTURE, 1 << 30, 0), records(0, 3))
    with pytest.raises(SpoolMissing):
        RawSpool.open(tmp_path, CAPTURE + 1)
    # Another capture's drainer starts afresh, at whatever position its ring has.
    SpoolWriter(tmp_path, CAPTURE + 1, 1 << 30, 7 * RECORD_BYTES)
    spool = RawSpool.open(tmp_path, CAPTURE + 1)
    assert spool.drained == spool.released == 7 * RECORD_BYTES
    assert not list(tmp_path.glob("raw-*"))


def test_chunks_are_bounded_and_recycled(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path, CAPTURE, 3 * CHUNK_BYTES, 0)
    count = CHUNK_BYTES // RECORD_BYTES
    spool = RawSpool.open(tmp_path, CAPTURE)
    for number in range(8):
        assert writer.room(number * CHUNK_BYTES)
        end = put(writer, records(number * count, count))
        if number >= 2:
            assert not writer.room(end)
            assert numbers(spool, spool.released, spool.released + 2 * RECORD_BYTES)[0] == (number - 2) * count
            spool.release(end - 2 * CHUNK_BYTES)
        assert len(list(tmp_path.glob("raw-*"))) <= 4
    spool.release(spool.drained)
    writer.tidy()
    assert len(list(tmp_path.glob("raw-*"))) == 1


def test_marks(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path, CAPTURE, 1 << 30, 0)
    spool = RawSpool.open(tmp_path, CAPTURE)
    assert spool.find_mark(0) is None and spool.newest_mark() is None and spool.marks() == []
    total = 2 * MARKS + 17
    for number in range(total):
        writer.publish(number * 10, number * RECORD_BYTES)
    held = spool.marks()
    assert held[-1] == spool.newest_mark() == Mark((total - 1) * 10, (total - 1) * RECORD_BYTES)
    assert len(held) == MARKS - 1
    source = random.Random(3)
    for after in [0, held[0].monotonic_ns, *(source.randrange(total * 10) for _ in range(500))]:
        assert spool.find_mark(after) == next((mark for mark in held if mark.monotonic_ns >= after), None)
    assert spool.find_mark(total * 10) is None


async def test_waiting_for_a_mark_has_a_deadline(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path, CAPTURE, 1 << 30, 0)
    writer.publish(5, 0)
    spool = RawSpool.open(tmp_path, CAPTURE)
    assert await spool.wait_mark(5) == Mark(5, 0)
    with pytest.raises(TimeoutError):
        await spool.wait_mark(6, deadline_s=0.05)


def test_every_interrupted_copy_is_repeated_without_a_trace(tmp_path: Path) -> None:
    """The drainer dies after any of its steps; its successor starts from the ring's cursor, which comes last."""
    seed = 20261123
    source = random.Random(seed)
    cursor = total = 0
    read_at = 0
    seen: list[int] = []
    for _ in range(120):
        writer = SpoolWriter(tmp_path, CAPTURE, 64 << 20, cursor * RECORD_BYTES)
        spool = RawSpool.open(tmp_path, CAPTURE)
        for _ in range(source.randrange(4)):
            made = records(cursor, source.randrange(1, 400))
            step = source.choice(["torn", "data", "drained", "cursor"])
            if step == "torn":  # part of the bytes, no cursor
                writer.write(cursor * RECORD_BYTES, [memoryview(made[:1].tobytes())[: source.randrange(RECORD_BYTES)]])
                break
            if step == "data":
                drained = writer.fields[layout.F_DRAINED]
                put(writer, made)
                writer.fields[layout.F_DRAINED] = drained
                break
            put(writer, made)
            if step == "drained":
                total = max(total, cursor + len(made))
                break
            cursor += len(made)
            total = max(total, cursor)
        assert spool.drained == total * RECORD_BYTES, f"seed {seed}"
        seen += numbers(spool, read_at, spool.drained)
        read_at = spool.drained
        spool.release(read_at)
        spool.close()
        # What is in the ring between the cursor and ``total`` is the same after a restart: it was not overwritten.
        cursor = source.choice([cursor, total])
    assert seen == list(range(total)), f"seed {seed}"
