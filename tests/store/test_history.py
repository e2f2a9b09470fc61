"""Feed, recovery points, fuzzy intervals, branches, cursors, bookmarks and the other small facts."""

from __future__ import annotations

from pathlib import Path

import pytest

from cdp.store import Store
from cdp.store.errors import BookmarkExists, UnknownBookmark, UnknownPosition
from journal.errors import NoRecoveryPoint
from journal.extent import Kind
from journal.position import Position
from journal.segment import Flags
from tests.store.source import SECOND_NS, Source, make

MIB = 1 << 20


def fill(store: Store, source: Source, flags: str) -> list[Position]:
    """One segment per letter: ``.`` recovery point, ``f`` fuzzy, ``c`` continues."""
    kinds = {".": Flags.NONE, "f": Flags.FUZZY, "c": Flags.CONTINUES}
    return [source.put(store, [(0, 512 * n, 512, int(Kind.DATA))], kinds[flag]) for n, flag in enumerate(flags)]


def test_the_feed_follows_a_position_in_pieces(store: Store) -> None:
    source = make(store, MIB)
    genesis = source.position
    stored = fill(store, source, "......")
    store.flush()
    stored += fill(store, source, "....")
    at, seen = genesis, []
    while headers := store.headers_after(source.machine, at, 3):
        seen += [header.position for header in headers]
        at = seen[-1]
    assert seen == stored
    assert store.backlog_bytes(source.machine, stored[3])[0] == 6
    with pytest.raises(UnknownPosition):
        store.headers_after(source.machine, Position(1, 3, bytes(32)), 3)


def test_the_feed_leads_across_generations_and_only_along_the_live_ones(store: Store) -> None:
    source = make(store, MIB)
    first = fill(store, source, ".....")
    source.branch(store, first[2])
    second = fill(store, source, "...")
    follow = [header.position for header in store.headers_after(source.machine, first[0], 100)]
    assert follow == [*first[1:3], *second]
    assert not store.contains(source.machine, first[3])
    assert store.contains(source.machine, first[2])
    with pytest.raises(UnknownPosition):
        store.headers_after(source.machine, first[4], 100)
    # The dead branch can still be read, but no time leads there.
    source.check(store, first[4])
    points = store.recovery_points(source.machine, 0, 10**6 * SECOND_NS).points
    assert [Position.parse(point.position) for point in points] == [*first[:3], *second]


def test_recovery_points_and_fuzzy_intervals(store: Store) -> None:
    source = make(store, MIB)
    stored = fill(store, source, "ff..cc.fcf..")
    history = store.recovery_points(source.machine, 0, 10**6 * SECOND_NS)
    assert [Position.parse(point.position) for point in history.points] == [stored[n] for n in (2, 3, 6, 10, 11)]
    assert [(f.start_ns, f.end_ns) for f in history.fuzzy] == [
        (None, 3 * SECOND_NS),
        (7 * SECOND_NS, 11 * SECOND_NS),
    ]
    assert store.last_recovery_point(source.machine) == stored[11]
    some = store.recovery_points(source.machine, 4 * SECOND_NS, 9 * SECOND_NS)
    assert [Position.parse(point.position) for point in some.points] == [stored[3], stored[6]]
    assert [f.end_ns for f in some.fuzzy] == [11 * SECOND_NS]
    fill(store, source, "ff")
    assert store.recovery_points(source.machine, 0, 10**6 * SECOND_NS).fuzzy[-1].end_ns is None
    assert store.last_recovery_point(source.machine) == stored[11]


def test_the_position_at_a_time(store: Store) -> None:
    source = make(store, MIB)
    stored = fill(store, source, "f..cc.ff..")

    def at(seconds: float) -> Position:
        return store.position_at(source.machine, int(seconds * SECOND_NS))

    assert at(2) == at(2.9) == stored[1]
    assert at(3) == at(4.5) == at(5.9) == stored[2]
    assert at(6) == at(6.9) == stored[5]
    assert at(9) == stored[8]
    assert at(10**6) == stored[9]
    with pytest.raises(NoRecoveryPoint) as fuzzy:
        at(7.5)
    assert fuzzy.value.fields["before_ns"] == 6 * SECOND_NS
    assert fuzzy.value.fields["after_ns"] == 9 * SECOND_NS
    assert fuzzy.value.fields["fuzzy"]
    with pytest.raises(NoRecoveryPoint) as early:
        at(0.5)
    assert early.value.fields["before_ns"] is None and early.value.fields["after_ns"] == 2 * SECOND_NS


def test_history_before_a_new_seed_stays_recoverable(store: Store) -> None:
    source = make(store, MIB)
    before = fill(store, source, "...")
    source.branch(store, None, "seeded anew")
    after = fill(store, source, "f..")
    assert store.position_at(source.machine, 3 * SECOND_NS) == before[2]
    assert store.position_at(source.machine, 5 * SECOND_NS) == after[1]
    assert not store.contains(source.machine, before[2])
    for position in (*before, *after):
        source.check(store, position)
    source.branch(store, before[1], "rolled back to before the seed")
    source.check(store, source.put(store, [(0, 0, 512, 1)]))


def test_small_facts_survive_a_restart(tmp_path: Path) -> None:
    with Store.open(tmp_path / "store", clock_ns=lambda: 42) as store:
        source = make(store, MIB)
        stored = fill(store, source, ".f..")
        store.set_cursor(source.machine, "standby", stored[2])
        with pytest.raises(UnknownPosition):
            store.set_cursor(source.machine, "standby", Position(1, 9, bytes(32)))
        store.add_bookmark(
            source.machine, "before upgrade", stored[2], "v15", consistency="application", hooks="frozen"
        )
        with pytest.raises(BookmarkExists):
            store.add_bookmark(source.machine, "before upgrade", stored[3])
        with pytest.raises(UnknownPosition):
            store.add_bookmark(source.machine, "inside", stored[1])
        store.save_takeover("t1", b"record")
        store.tokens.put("hash", b"once")
        store.credentials.put("c1", b"\0" * 1000)
        for number in range(3):
            store.audit("anna", "takeover", "db1", {"n": str(number)})
    with Store.open(tmp_path / "store") as store:
        assert store.cursor(source.machine, "standby") == stored[2]
        assert [cursor.consumer for cursor in store.cursors(source.machine)] == ["standby"]
        assert store.remove_cursor(source.machine, "standby")
        assert store.cursor(source.machine, "standby") is None
        bookmark = store.bookmark(source.machine, "before upgrade")
        assert bookmark.position == str(stored[2]) and bookmark.created_at_ns == 42
        assert bookmark.consistency == "application" and bookmark.hooks == "frozen" and not bookmark.hold
        store.remove_bookmark(source.machine, "before upgrade")
        with pytest.raises(UnknownBookmark):
            store.bookmark(source.machine, "before upgrade")
        assert store.load_takeovers() == {"t1": b"record"}
        assert store.tokens.take("hash") == b"once"
        assert store.tokens.take("hash") is None
        assert store.credentials.items() == {"c1": b"\0" * 1000}
        assert [entry.details["n"] for entry in store.audit_log(2)] == ["2", "1"]
