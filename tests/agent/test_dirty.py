"""Marks, and walking through them."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cdp.agent.dirty import DirtyMap, Geometry
from cdp.agent.intervals import key

G = 1 << 16
DISKS = [Geometry(0, 40 * G + 512, G), Geometry(1, 7 * G, G)]


def marked(map_: DirtyMap, chunk: int = 4 * G) -> set[tuple[int, int]]:
    """Granules met by walking, which must be ascending, within the disk and inside one chunk."""
    found: set[tuple[int, int]] = set()
    disk, offset = 0, 0
    while (step := map_.next_range(disk, offset, chunk)) is not None:
        assert (step[0], step[1]) >= (disk, offset)
        assert step[2] > 0 and step[1] // chunk == (step[1] + step[2] - 1) // chunk
        assert step[1] + step[2] <= map_.disks[step[0]].size_bytes
        found |= {(step[0], at // G) for at in range(step[1], step[1] + step[2], 512)}
        disk, offset = step[0], step[1] + step[2]
    return found


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 30), st.integers(1, 12)), max_size=6))
@settings(max_examples=200, deadline=None)
def test_walking_meets_exactly_the_marked_granules(ranges: list[tuple[int, int, int]]) -> None:
    dirty = DirtyMap(DISKS)
    want: set[tuple[int, int]] = set()
    for disk, first, count in ranges:
        size = DISKS[disk].size_bytes
        low, high = first * G // 2, min((first + count) * G // 2, size)
        if low >= high:
            continue
        dirty.mark(np.array([key(disk, low)], np.uint64), np.array([key(disk, high)], np.uint64))
        want |= {(disk, granule) for granule in range(low // G, (high - 1) // G + 1)}
    assert marked(dirty) == want
    again = DirtyMap(DISKS)
    again.unpack(dirty.pack())
    assert marked(again) == want
    assert bool(dirty) == bool(want)


def test_everything() -> None:
    dirty = DirtyMap(DISKS)
    dirty.mark_all()
    assert marked(dirty) == {(0, granule) for granule in range(41)} | {(1, granule) for granule in range(7)}
    steps = []
    at = (0, 0)
    while (step := dirty.next_range(*at, 1 << 20)) is not None:
        steps.append(step)
        at = (step[0], step[1] + step[2])
    assert sum(step[2] for step in steps) == sum(disk.size_bytes for disk in DISKS)


def test_marks_of_a_smaller_map_grow_into_a_larger_one_as_dirty() -> None:
    small = DirtyMap([Geometry(0, 8 * G, G)])
    small.mark_all()
    large = DirtyMap([Geometry(0, 80 * G, G)])
    large.unpack(small.pack())
    assert marked(large) == {(0, granule) for granule in range(80)}
