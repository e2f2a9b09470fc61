"""A flipped byte anywhere in the store's files is found by ``verify`` and never served."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from cdp.store import ImageReader, Store, Verifier, verify
from cdp.store.errors import StoredDamage
from journal.position import Position
from tests.store.source import SECOND_NS, Source, make

SIZE = 512 << 10


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


def filled(store: Store, seconds: int = 12) -> tuple[Source, list[Position]]:
    source = make(store, SIZE, seed=5)
    return source, [source.put(store, source.random_writes()) for _ in range(seconds)]


@pytest.mark.parametrize("seed", range(8))
def test_flipped_bytes_in_segment_files_are_found_and_never_served(tmp_path: Path, seed: int) -> None:
    choose = random.Random(seed)
    with Store.open(tmp_path / "store", file_bytes=1 << 20) as store:
        source, stored = filled(store)
        assert verify(store, source.machine).clean
        state = store.state(source.machine)
        for position in choose.sample(stored, 3):
            entry = store.entry(state, position.generation, position.seq)
            assert entry is not None
            used = 128 + entry.header.segment_bytes + 8 * (entry.header.frame_count + 1)
            flip(store.pool.path(entry.file), entry.offset + choose.randrange(used))
        result = verify(store, source.machine)
        assert len(result.damages) == 3 and not result.clean
        for position in stored:
            try:
                assert store.read_segment(source.machine, position) == source.sealed[position][1]
            except StoredDamage as error:
                assert error.remedy
        for position in stored:
            try:
                source.check(store, position)
            except StoredDamage as error:
                assert error.fields["seq"] in {int(Position.parse(d.position or "").seq) for d in result.damages}


def test_a_flipped_byte_in_the_base_image_is_found_and_never_served(tmp_path: Path) -> None:
    with Store.open(tmp_path / "store", file_bytes=1 << 20) as store:
        source, stored = filled(store)
        store.retain(source.machine, keep_ns=2 * SECOND_NS, now_ns=12 * SECOND_NS)
        assert verify(store, source.machine).clean
        source.check(store, stored[-1])
        image = next((tmp_path / "store" / "base").rglob("*.img"))
        data = image.read_bytes()
        at = next(at for at in range(0, SIZE, 65536) if any(data[at : at + 65536]))
        flip(image, at + 100)
        assert not verify(store, source.machine).clean
        base = store.state(source.machine).base
        assert base is not None
        with (
            ImageReader(store, source.machine, base.target_position) as reader,
            pytest.raises(StoredDamage) as damage,
        ):
            reader.read(0, 0, SIZE)
        assert damage.value.fields["offset"] == at


@pytest.mark.parametrize("restart", [False, True])
def test_folding_goes_past_a_damage_as_soon_as_it_is_healed(tmp_path: Path, restart: bool) -> None:
    store = Store.open(tmp_path / "store", file_bytes=1 << 20)
    source = make(store, SIZE, seed=5)
    for second in range(12):
        # The block of second 2 is written again in second 8.
        source.put(store, [(0, 4096 * (2 if second == 8 else second), 4096, 1)])
    entry = store.entry(store.state(source.machine), 1, 3)
    assert entry is not None
    flip(store.pool.path(entry.file), entry.offset + 128 + 256 + entry.header.table_bytes + 5)
    for _ in range(2):
        with pytest.raises(StoredDamage):
            store.retain(source.machine, keep_ns=6 * SECOND_NS, now_ns=12 * SECOND_NS)
        if restart:
            store.abandon()
            store = Store.open(tmp_path / "store", file_bytes=1 << 20)
    assert not verify(store, source.machine).clean
    store.retain(source.machine, keep_ns=2 * SECOND_NS, now_ns=12 * SECOND_NS)
    assert verify(store, source.machine).clean
    for point in store.recovery_points(source.machine, 0, 2**62).points:
        source.check(store, Position.parse(point.position))
    store.close()


def test_a_damaged_index_file_of_the_runs_is_built_again(tmp_path: Path) -> None:
    with Store.open(tmp_path / "store", file_bytes=1 << 20) as store:
        source = make(store, SIZE, seed=3)
        stored = [source.put(store, [(0, 512 * (n % 900), 512, 1)]) for n in range(1100)]
        source.check(store, stored[-1])
        runs = list((tmp_path / "store" / "runs").rglob("*.run"))
        assert runs
    for where in (20, 150, -20000, -5):
        for path in (tmp_path / "store" / "runs").rglob("*.run"):
            flip(path, where % path.stat().st_size)
        with Store.open(tmp_path / "store", file_bytes=1 << 20) as store:
            for position in (stored[-1], stored[700], stored[3]):
                source.check(store, position)


def test_rot_in_the_tail_that_the_index_does_not_know_is_not_taken_for_a_torn_write(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store", file_bytes=1 << 20, flush_interval_s=1e6)
    source, stored = filled(store)
    entry = store.entry(store.state(source.machine), 1, 9)
    assert entry is not None
    store.abandon()
    flip(tmp_path / "store" / "segments" / f"{entry.file:08d}.seg", entry.offset + 300)
    with Store.open(tmp_path / "store", file_bytes=1 << 20) as store:
        assert store.live(source.machine) == stored[7]
        assert "damaged" in store.audit_log()[0].action
        source.check(store, stored[7])
        source.position = stored[7]
        source.check(store, source.put(store, [(0, 0, 512, 1)]))
    with Store.open(tmp_path / "store", file_bytes=1 << 20) as store:
        source.check(store, source.position)
        assert verify(store, source.machine).clean


def test_verify_paces_itself_and_can_be_stopped(store: Store) -> None:
    source, _ = filled(store, 5)
    waits: list[float] = []

    def stop(seconds: float) -> bool:
        waits.append(seconds)
        return len(waits) == 3

    result = Verifier(store, source.machine, bytes_per_s_max=1e3, stop=stop).run()
    assert not result.complete and not result.clean and len(waits) == 3
    assert waits[0] > 1
