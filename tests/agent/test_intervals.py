"""Interval sets against Python sets of bytes."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cdp.agent.intervals import Intervals

ranges_of = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 12)), max_size=12)


def interval_set(ranges: list[tuple[int, int]]) -> Intervals:
    starts = np.array([start for start, _ in ranges], np.uint64)
    return Intervals.of(starts, starts + np.array([length for _, length in ranges], np.uint64))


def points(found: Intervals) -> set[int]:
    held: set[int] = set()
    last = -1
    for start, end in zip(found.starts.tolist(), found.ends.tolist(), strict=True):
        assert last < start < end, "sorted, disjoint, not touching, not empty"
        held |= set(range(start, end))
        last = end
    return held


@given(ranges_of, ranges_of)
@settings(max_examples=400, deadline=None)
def test_set_operations(one: list[tuple[int, int]], other: list[tuple[int, int]]) -> None:
    a, b = interval_set(one), interval_set(other)
    pa, pb = points(a), points(b)
    assert pa == {at for start, length in one for at in range(start, start + length)}
    assert points(a.union(b)) == pa | pb
    assert points(a.minus(b)) == pa - pb
    assert points(a.within(b)) == pa & pb
    assert a.total == len(pa)


@given(ranges_of, st.integers(0, 80), st.integers(0, 80))
@settings(max_examples=300, deadline=None)
def test_windows(ranges: list[tuple[int, int]], one: int, other: int) -> None:
    low, high = sorted((one, other))
    a = interval_set(ranges)
    assert points(a.from_key(low)) == {at for at in points(a) if at >= low}
    assert points(a.between(low, high)) == {at for at in points(a) if low <= at < high}
    asked = np.arange(0, 80, dtype=np.uint64)
    assert set(asked[a.holds(asked)].tolist()) == points(a)
