"""What the store accepts, what it refuses, and with which error."""

from __future__ import annotations

import errno
import itertools
import uuid
from pathlib import Path

import pytest

from cdp.store import Store, verify
from cdp.store.errors import (
    MachineExists,
    StoreFailed,
    StoreFormatUnknown,
    StoreFull,
    StoreLocked,
    UnknownDisk,
    UnknownMachine,
    UnknownPosition,
)
from journal.errors import (
    CdpError,
    ForeignSegment,
    PositionFork,
    PositionGap,
    SegmentDamaged,
    StaleGeneration,
    UnknownGeneration,
)
from journal.extent import Kind
from journal.position import Position
from tests.store.faulty import FaultyFiles, PowerCut
from tests.store.source import disk_infos, make

MIB = 1 << 20
WRITE = [(0, 4096, 8192, int(Kind.DATA))]


def test_a_segment_is_stored_once_and_answered_alike(store: Store) -> None:
    source = make(store, MIB)
    raw = source.encode(WRITE)
    position, duplicate = store.put_segment(source.machine, raw)
    assert not duplicate
    assert store.put_segment(source.machine, raw) == (position, True)
    assert store.live(source.machine) == position
    assert store.read_segment(source.machine, position) == raw
    header = store.live_header(source.machine)
    assert header is not None and header.position == position
    assert store.usage(source.machine).segment_bytes > len(raw)


def test_every_wrong_segment_has_its_error(store: Store) -> None:
    source, other = make(store, MIB), make(store, MIB, name="db2")
    first = source.encode(WRITE)
    store.put_segment(source.machine, first)
    source.accept(store.live(source.machine))
    fork = make(store, MIB, name="db3")
    fork.machine, fork._encoder = source.machine, source._encoder
    fork.position = next(iter(source.images))
    fork.images[fork.position] = [bytes(MIB)]
    for raw, machine, error in [
        (first[:-1], source.machine, SegmentDamaged),
        (first[:100], source.machine, SegmentDamaged),
        (bytes([*first[:-1], first[-1] ^ 1]), source.machine, SegmentDamaged),
        (first, other.machine, ForeignSegment),
        (first, uuid.uuid4(), UnknownMachine),
        (fork.encode([(0, 0, 512, 1)]), source.machine, PositionFork),
    ]:
        with pytest.raises(error):
            store.put_segment(machine, raw)
    second = source.encode(WRITE)
    gap = make(store, MIB, name="db4")
    gap.machine, gap._encoder, gap.images = source.machine, source._encoder, source.images
    gap.position = next(reversed(source.images))
    with pytest.raises(PositionGap) as gapped:
        store.put_segment(source.machine, gap.encode(WRITE))
    assert gapped.value.fields["expected_seq"] == 2
    parent = store.live(source.machine)
    genesis = store.start_generation(source.machine, parent, "takeover")
    with pytest.raises(StaleGeneration):
        store.put_segment(source.machine, second)
    ahead = Position(genesis.generation + 1, 0, genesis.digest)
    source.images[ahead] = source.images[parent]
    source.position = ahead
    with pytest.raises(UnknownGeneration):
        store.put_segment(source.machine, source.encode(WRITE))
    assert store.live(source.machine) == genesis


def test_writes_outside_the_disks_are_refused_until_the_disks_are_known(store: Store) -> None:
    source = make(store, MIB)
    source.sizes = [4 * MIB, MIB]
    source.images[source.position] = [bytes(4 * MIB), bytes(MIB)]
    beyond = source.encode([(0, MIB - 512, 1024, 1)])
    with pytest.raises(UnknownDisk) as refused:
        store.put_segment(source.machine, beyond)
    assert refused.value.transient and refused.value.fields["size_bytes"] == MIB
    elsewhere = source.encode([(1, 0, 512, 1)])
    with pytest.raises(UnknownDisk):
        store.put_segment(source.machine, elsewhere)
    store.update_disks(source.machine, disk_infos(4 * MIB, MIB))
    position, _ = store.put_segment(source.machine, beyond)
    source.check(store, position)


def test_a_failing_disk_acknowledges_nothing_and_loses_nothing(tmp_path: Path) -> None:
    files = FaultyFiles()
    with Store.open(tmp_path / "store", file_bytes=MIB, fs=files) as store:
        source = make(store, MIB)
        kept = source.put(store, WRITE)
        raw = source.encode(WRITE)
        for number, error in ((errno.EIO, StoreFailed), (errno.ENOSPC, StoreFull), (errno.EDQUOT, StoreFull)):
            files.fail_next = number
            with pytest.raises(error) as failed:
                store.put_segment(source.machine, raw)
            assert failed.value.remedy
            assert store.live(source.machine) == kept
        position, duplicate = store.put_segment(source.machine, raw)
        assert not duplicate
        source.check(store, position)


def test_the_power_is_cut_at_each_step_of_a_large_segment(tmp_path: Path) -> None:
    """Its body is written in pieces by another thread, while it is being verified."""
    for step in itertools.count(1):
        files, directory = FaultyFiles(step), tmp_path / str(step)
        store = Store.open(directory, file_bytes=8 * MIB, flush_interval_s=1e6, fs=files)
        source = make(store, 8 * MIB)
        source.put(store, WRITE)
        raw = source.encode([(0, MIB, 5 * MIB, Kind.DATA)], compressible=False)
        kept, position = source.position, next(reversed(source.sealed))
        files.cut_after(step)
        try:
            store.put_segment(source.machine, raw)
        except PowerCut:
            files.power_cut()
            store.abandon()
        else:
            files.cut_after(None)
            store.close()
            assert step == 7  # three pieces, sums, header, sync: all of them were cut off before
            break
        with Store.open(directory, file_bytes=8 * MIB) as store:
            # What was not acknowledged may have become durable all the same: then as a whole.
            source.accept(store.live(source.machine))
            assert source.position in (kept, position)
            source.check(store, source.position)
            assert store.put_segment(source.machine, raw) == (position, source.position == position)
            source.check(store, position)
            assert verify(store, source.machine).clean


def test_a_large_segment_that_is_damaged_leaves_nothing(tmp_path: Path) -> None:
    with Store.open(tmp_path / "store", file_bytes=8 * MIB) as store:
        source = make(store, 8 * MIB)
        kept = source.put(store, WRITE)
        raw = source.encode([(0, MIB, 5 * MIB, Kind.DATA)], compressible=False)
        damaged = bytearray(raw)
        damaged[-1] ^= 1
        with pytest.raises(SegmentDamaged):
            store.put_segment(source.machine, damaged)
        assert store.live(source.machine) == kept
        small = source.put(store, [(0, 0, 4096, Kind.DATA)])
        source.check(store, small)
        assert verify(store, source.machine).clean


def test_no_room_for_the_next_file_is_told_before_the_acknowledgement(tmp_path: Path) -> None:
    files = FaultyFiles()
    with Store.open(tmp_path / "store", file_bytes=64 << 10, fs=files) as store:
        source = make(store, MIB)
        source.put(store, [(0, 0, 32 << 10, 1)])
        raw = source.encode([(0, 0, 128 << 10, 1)], compressible=False)
        files.fail_next = errno.ENOSPC
        with pytest.raises(StoreFull):
            store.put_segment(source.machine, raw)
        position, _ = store.put_segment(source.machine, raw)
        source.check(store, position)


def test_a_full_index_refuses_and_keeps_what_exists(tmp_path: Path) -> None:
    stored: list[Position] = []
    with Store.open(tmp_path / "store", file_bytes=MIB, map_bytes=1 << 20, flush_interval_s=0.01) as store:
        source = make(store, MIB)
        with pytest.raises(StoreFull) as full:
            stored.extend(source.put(store, []) for _ in range(20_000))
        assert "map_bytes" in full.value.remedy
        assert len(stored) > 100
        # Deleting has its reserve.
        store.add_bookmark(source.machine, "last", stored[-1])
        store.remove_bookmark(source.machine, "last")
    with Store.open(tmp_path / "store", file_bytes=MIB, map_bytes=64 << 20) as store:
        assert store.live(source.machine) == stored[-1]
        stored.append(source.put(store, WRITE))
        genesis = store.generations(source.machine)[0].genesis(source.machine)
        assert [header.position for header in store.headers_after(source.machine, genesis, 10**6)] == stored


def test_one_process_at_a_time(store: Store) -> None:
    with pytest.raises(StoreLocked):
        Store.open(store.directory)


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photos").write_text("mine")
    with pytest.raises(StoreFormatUnknown):
        Store.open(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_a_store_of_another_version_is_not_touched(tmp_path: Path) -> None:
    with Store.open(tmp_path / "store") as store, store.index.write() as txn:
        txn.put("meta", b"format", b"cdp store 99")
    with pytest.raises(StoreFormatUnknown):
        Store.open(tmp_path / "store")


def test_machines_have_names_and_can_be_removed(store: Store) -> None:
    source = make(store, MIB)
    for _ in range(40):
        source.put(store, [(0, 0, 128 << 10, 1)])
    with pytest.raises(MachineExists):
        store.create_machine("db1", [])
    assert store.rename_machine(source.machine, "db9").name == "db9"
    assert store.machine("db9").uuid == store.machine(str(source.machine)).uuid == source.machine
    make(store, MIB, name="db1")
    store.remove_machine(source.machine)
    for lookup in ("db9", source.machine):
        with pytest.raises(UnknownMachine) as unknown:
            store.machine(lookup)
        assert isinstance(unknown.value, CdpError)
    assert [machine.name for machine in store.list_machines()] == ["db1"]
    assert all(row.machine != source.machine for row in store.pool._rows.values())
    again = make(store, MIB, name="db9")
    again.check(store, again.put(store, WRITE))


def test_a_generation_starts_on_a_stored_position_only(store: Store) -> None:
    source = make(store, MIB)
    position = source.put(store, WRITE)
    with pytest.raises(UnknownPosition):
        store.start_generation(source.machine, Position(1, 1, bytes(32)), "wrong")
    with pytest.raises(UnknownPosition):
        store.start_generation(source.machine, Position(7, 1, position.digest), "wrong")
    source.branch(store, position)
    source.branch(store, source.position)
    source.check(store, source.put(store, [(0, 0, 512, 1)]))
