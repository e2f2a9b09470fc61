"""Retention with little room on the disk, and the sums that tell how much is stored."""

from __future__ import annotations

from pathlib import Path

import pytest

from cdp.store import Store, verify
from cdp.store.base import CHUNK_BYTES
from cdp.store.errors import StoreFull
from cdp.store.tally import BUCKET_SEGMENTS
from journal.position import Position
from tests.store.faulty import FaultyFiles
from tests.store.source import SECOND_NS, Source, make

MIB = 1 << 20
NOW_NS = 10**6 * SECOND_NS


def fold(store: Store, source: Source) -> Position | None:
    done = store.retain(source.machine, keep_ns=0, now_ns=NOW_NS)
    return None if done.folded_to is None else Position.parse(done.folded_to)


def test_a_step_is_as_small_as_the_room_there_is(tmp_path: Path) -> None:
    """Every second adds a chunk to the base image; then they are written again, which adds none."""
    files = FaultyFiles()
    with Store.open(tmp_path / "store", file_bytes=MIB, fs=files) as store:
        source = make(store, MIB)
        first = [source.put(store, [(0, n * CHUNK_BYTES, 4096, 1)]) for n in range(8)]
        again = [source.put(store, [(0, n * CHUNK_BYTES + 8192, 4096, 1)]) for n in range(8)]
        _, reserve = store.pool.room()
        files.free_bytes = reserve // 4
        with pytest.raises(StoreFull) as full:
            fold(store, source)
        assert full.value.fields["growth_bytes"] == CHUNK_BYTES and full.value.remedy
        source.check(store, first[0])
        files.free_bytes = reserve // 4 + 2 * CHUNK_BYTES
        assert fold(store, source) == first[1]
        assert fold(store, source) == first[2], "of 13 one, of 6 one"
        for position in (first[2], first[3], again[-1]):
            source.check(store, position)
        files.free_bytes = reserve // 4 + 5 * CHUNK_BYTES
        assert fold(store, source) == again[-1]
        source.check(store, again[-1])
        assert verify(store, source.machine).clean


def test_a_file_is_not_taken_from_what_folding_needs(tmp_path: Path) -> None:
    files = FaultyFiles()
    with Store.open(tmp_path / "store", file_bytes=MIB, fs=files) as store:
        source = make(store, MIB)
        _, reserve = store.pool.room()
        files.free_bytes = reserve + MIB - 1
        raw = source.encode([(0, 0, 4096, 1)])
        with pytest.raises(StoreFull) as full:
            store.put_segment(source.machine, raw)
        assert (full.value.fields["free_bytes"], full.value.fields["reserve_bytes"]) == (reserve + MIB - 1, reserve)
        refusal = store.refusal(source.machine)
        assert refusal is not None and refusal.code == "store-full"
        files.free_bytes = reserve + MIB
        store.put_segment(source.machine, raw)
        assert store.refusal(source.machine) is None


def test_what_is_stored_is_told_without_counting(tmp_path: Path) -> None:
    seconds = 2 * BUCKET_SEGMENTS + 100
    with Store.open(tmp_path / "store", file_bytes=4 * MIB, map_bytes=64 * MIB) as store:
        source = make(store, 4096)
        stored = [source.put(store, [(0, 0, 512, 1)] if n % 7 == 0 else []) for n in range(seconds)]
        source.images = {source.position: source.images[source.position]}
        headers = [source.sealed[position][0] for position in stored]
        for seq in (0, 1, 900, BUCKET_SEGMENTS - 1, BUCKET_SEGMENTS, 2 * BUCKET_SEGMENTS + 50, seconds):
            at = stored[seq - 1] if seq else Position.genesis(source.machine, 1, None)
            later = [header.segment_bytes for header in headers[seq:]]
            assert store.backlog_bytes(source.machine, at) == (len(later), sum(later))
        usage = store.usage(source.machine)
        assert (usage.segments, usage.oldest_ns, usage.newest_ns) == (seconds, SECOND_NS, seconds * SECOND_NS)
        assert usage.recoverable_from_ns == SECOND_NS and usage.recent_ns == (seconds - 1) * SECOND_NS
        assert 0 < usage.segment_bytes - usage.recent_bytes < 16 << 10
        store.retain(source.machine, keep_ns=600 * SECOND_NS, now_ns=seconds * SECOND_NS)
        kept = store.usage(source.machine)
        assert kept.segments == 600 and kept.oldest_ns == (seconds - 600) * SECOND_NS
        # A store of the version before has no sums: they are counted once.
        with store.index.write() as txn:
            for key, _ in list(txn.scan("tallies", b"", b"")):
                txn.delete("tallies", key)
            txn.put("meta", b"format", b"cdp store 1")
    with Store.open(tmp_path / "store", file_bytes=4 * MIB, map_bytes=64 * MIB) as store:
        assert store.usage(source.machine) == kept
