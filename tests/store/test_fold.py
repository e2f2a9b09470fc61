"""Folding in batches: what a batch holds, what it costs the disk, and chunks that are written as a whole."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from cdp.store import Store, verify
from cdp.store.base import BATCH_CHUNKS, CHUNK_BYTES
from cdp.store.files import OsFiles
from cdp.store.retention import batches
from tests.store.source import SECOND_NS, make

MIB = 1 << 20
WRITES = 2 * BATCH_CHUNKS


class CountingFiles(OsFiles):
    """The real thing, and how often each kind of file was synced."""

    def __init__(self) -> None:
        self.syncs: Counter[str] = Counter()
        self._paths: dict[int, Path] = {}

    def open(self, path: Path, *, write: bool = False) -> int:
        handle = super().open(path, write=write)
        self._paths[handle] = path
        return handle

    def sync(self, handle: int) -> None:
        super().sync(handle)
        if handle in self._paths:
            self.syncs[self._paths[handle].suffix] += 1


@given(
    st.lists(
        st.tuples(st.integers(0, 300 * CHUNK_BYTES), st.integers(1, 400 * CHUNK_BYTES)), min_size=1, max_size=40
    ).map(lambda gaps: [(gap // 512 * 512, -(-length // 512) * 512) for gap, length in gaps])
)
def test_batches_are_bounded_and_leave_nothing_out(gaps: list[tuple[int, int]]) -> None:
    at = 0
    rows = []
    for gap, length in gaps:
        rows.append((at + gap, length, 1, 1, 1, 0))
        at += gap + length
    seen: set[int] = set()
    pieces = []
    for batch in batches(iter(rows)):
        chunks = {n for row in batch for n in range(row[0] // CHUNK_BYTES, -(-(row[0] + row[1]) // CHUNK_BYTES))}
        assert 0 < len(chunks) <= BATCH_CHUNKS and not chunks & seen
        seen |= chunks
        pieces += batch
    # Joined again they are the rows: each piece goes on where the one before it ended, on the disk and in the payload.
    joined: list[tuple[int, ...]] = []
    for offset, length, *rest, payload_offset in pieces:
        if payload_offset:
            start, done, *same, zero = joined.pop()
            assert (start + done, done, same) == (offset, payload_offset, rest)
            joined.append((start, done + length, *rest, zero))
        else:
            joined.append((offset, length, *rest, 0))
    assert joined == rows


def test_writes_all_over_a_disk_are_folded_with_few_syncs(tmp_path: Path) -> None:
    """By disk range each of them would be a batch of its own, with two syncs."""
    files = CountingFiles()
    with Store.open(tmp_path / "store", file_bytes=4 * MIB, fs=files) as store:
        source = make(store, 64 * MIB)
        step = 64 * MIB // WRITES
        position = source.put(store, [(0, n * step, 512, 1) for n in range(WRITES)])
        files.syncs.clear()
        store.retain(source.machine, keep_ns=0, now_ns=10**6 * SECOND_NS)
        assert files.syncs[".img"] == files.syncs[".slots"] == WRITES // BATCH_CHUNKS
        source.check(store, position)


def test_a_chunk_that_is_written_as_a_whole_replaces_what_rotted(tmp_path: Path) -> None:
    """Its content and its slot: neither is needed for what comes in its place."""
    with Store.open(tmp_path / "store", file_bytes=4 * MIB) as store:
        source = make(store, 4 * CHUNK_BYTES)
        source.put(store, [(0, 0, 4 * CHUNK_BYTES, 1)])
        store.retain(source.machine, keep_ns=0, now_ns=10**6 * SECOND_NS)
        directory = store.base_directory(source.machine, 1)
        for name, at in (("0.img", CHUNK_BYTES + 5), ("0.slots", 2 * 32 + 8)):
            with (directory / name).open("r+b") as file:
                file.seek(at)
                file.write(b"rot")
        assert len(verify(store, source.machine).damages) == 2
        # One in one piece, one in two.
        position = source.put(
            store,
            [
                (0, CHUNK_BYTES, CHUNK_BYTES, 1),
                (0, 2 * CHUNK_BYTES, 512, 1),
                (0, 2 * CHUNK_BYTES + 512, CHUNK_BYTES - 512, 2),
            ],
        )
        store.retain(source.machine, keep_ns=0, now_ns=10**6 * SECOND_NS)
        source.check(store, position)
        assert verify(store, source.machine).clean
