"""What is laid below a machine before its first segment: there under everything later, whole or not at all after a
crash at any step, and never after anything was stored."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from cdp.store import Store
from cdp.store.base import CHUNK_BYTES
from journal.errors import PrefillClosed, PrefillRestarted, PrefillUnsettled
from journal.extent import Kind
from tests.store.faulty import FaultyFiles, PowerCut
from tests.store.source import Source, make

SIZES = (5 * CHUNK_BYTES, 3 * CHUNK_BYTES - 4096)


def content(seed: int) -> bytes:
    return random.Random(seed).randbytes(CHUNK_BYTES)


def lay(store: Store, source: Source, key: str, disk: int, numbers: list[int]) -> None:
    chunks = [(number * CHUNK_BYTES, memoryview(content(number))) for number in numbers]
    store.lay(source.machine, key, disk, chunks)


def expect(source: Source, disk: int, numbers: list[int]) -> None:
    """The model's image at the genesis has these chunks as well."""
    images = source.images[source.position]
    for number in numbers:
        at = number * CHUNK_BYTES
        images[disk] = images[disk][:at] + content(number) + images[disk][at + CHUNK_BYTES :]


def test_it_lies_below_everything_that_is_stored_and_folded_later(store: Store) -> None:
    source = make(store, *SIZES)
    key = store.begin_prefill(source.machine)
    lay(store, source, key, 0, [0, 3])
    lay(store, source, key, 1, [1])
    assert store.end_prefill(source.machine).state == "filled"
    expect(source, 0, [0, 3])
    expect(source, 1, [1])
    source.check(store, source.position)

    first = source.put(store, [(0, 0, 512, Kind.DATA), (0, 3 * CHUNK_BYTES, 8192, Kind.ZERO), (1, 512, 512, Kind.DATA)])
    second = source.put(store, [(0, CHUNK_BYTES, 4096, Kind.DATA), (1, CHUNK_BYTES, CHUNK_BYTES, Kind.DISCARD)])
    for position in (first, second):
        source.check(store, position)
    store.retain(source.machine, keep_ns=0, now_ns=10**18)
    source.check(store, second)
    assert store.recovery_points(source.machine, 0, 10**18).points[-1].position == str(second)


def test_nothing_is_laid_after_the_end_or_after_a_first_segment(store: Store) -> None:
    source = make(store, *SIZES)
    with pytest.raises(PrefillUnsettled):
        store.check_settled(source.machine)
    old = store.begin_prefill(source.machine)
    lay(store, source, old, 0, [0])
    key = store.begin_prefill(source.machine)
    with pytest.raises(PrefillRestarted):
        lay(store, source, old, 0, [1])
    assert store.end_prefill(source.machine).state == "none"
    assert store.end_prefill(source.machine).state == "none"
    store.check_settled(source.machine)
    for attempt in (lambda: store.begin_prefill(source.machine), lambda: lay(store, source, key, 0, [0])):
        with pytest.raises(PrefillClosed):
            attempt()
    source.check(store, source.position)

    other = make(store, *SIZES, name="db2")
    key = store.begin_prefill(other.machine)
    lay(store, other, key, 0, [2])
    expect(other, 0, [2])
    position = other.put(store, [(0, 0, 512, Kind.DATA)])
    other.check(store, position)
    with pytest.raises(PrefillClosed):
        lay(store, other, key, 0, [3])
    row = store.prefill(other.machine)
    assert row is not None
    assert row.state == "filled"


def test_it_goes_with_the_machine(store: Store) -> None:
    source = make(store, *SIZES)
    key = store.begin_prefill(source.machine)
    lay(store, source, key, 0, [0])
    store.end_prefill(source.machine)
    store.remove_machine(source.machine)
    assert store.settings.items() == {}
    assert list((store.directory / "base").iterdir()) == []


@pytest.mark.parametrize("seed", range(3))
def test_a_power_cut_at_any_step_leaves_all_of_it_or_nothing(tmp_path: Path, seed: int) -> None:
    for steps in itertools.count(1):
        directory = tmp_path / str(steps)
        files = FaultyFiles(seed * 1000 + steps)
        store = Store.open(directory, file_bytes=1 << 20, map_bytes=8 << 20, fs=files)
        source = make(store, *SIZES)
        files.cut_after(steps)
        through = False
        try:
            key = store.begin_prefill(source.machine)
            lay(store, source, key, 0, [0, 3])
            key = store.begin_prefill(source.machine)
            lay(store, source, key, 0, [1, 2])
            lay(store, source, key, 0, [4])
            lay(store, source, key, 1, [0])
            store.end_prefill(source.machine)
            through = True
        except PowerCut:
            pass
        files.power_cut()
        store.abandon()
        with Store.open(directory, file_bytes=1 << 20, map_bytes=8 << 20) as after:
            row = after.prefill(source.machine)
            assert row is None or row.state == "filled", f"{row} after step {steps}"
            if row is not None:
                expect(source, 0, [1, 2, 4])
                expect(source, 1, [0])
            source.check(after, source.position)
            assert after.may_prefill(source.machine) == (row is None)
            assert through <= (row is not None)
            position = source.put(after, [(0, 512, 1024, Kind.DATA)])
            source.check(after, position)
        if through:
            assert steps > 10
            return
