"""Any sequence of puts (writes, zeroes, discards), branches, folds, bookmarks, full disks, recoveries, restarts
and power cuts at any durable step: what was acknowledged is there, every recovery point that is offered is the image
that the source had, and the sums of what is stored are right."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cdp.store import Store, recover
from cdp.store.errors import StoreFull
from cdp.store.records import Span
from cdp.store.state import WHOLE
from journal.position import Position
from journal.segment import Flags
from tests.store.faulty import FaultyFiles, PowerCut
from tests.store.source import SCRATCH, SECOND_NS, Source, make

SIZES = (64 << 10, 24 << 10)
FLAGS = st.sampled_from([Flags.NONE, Flags.NONE, Flags.NONE, Flags.FUZZY, Flags.CONTINUES])


class CrashMachine(RuleBasedStateMachine):
    source: Source
    store: Store

    @initialize(seed=st.integers(0, 2**32))
    def begin(self, seed: int) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="cdp-store-test-", dir=SCRATCH))
        self.seed = seed
        self.acknowledged: list[Position] = []
        self.in_flight: Position | None = None
        self.held: dict[str, Position] = {}
        self.names = itertools.count()
        self._open()
        self.source = make(self.store, *SIZES, seed=seed)

    def _open(self) -> None:
        self.seed += 1
        self.files = FaultyFiles(self.seed)
        self.store = Store.open(
            self.directory,
            file_bytes=48 << 10,
            map_bytes=8 << 20,
            flush_interval_s=1e6,
            early_bytes=self.seed % 2 << 30,
            fs=self.files,
        )

    def _power_cut(self) -> None:
        self.files.power_cut()
        self.store.abandon()
        self._open()
        self._settle()

    def _settle(self) -> None:
        """After a restart: the tip is the last acknowledged segment, or the one that was on its way."""
        tip = self.store.live(self.source.machine)
        if tip != self.source.position:
            assert tip == self.in_flight, f"{tip.short} instead of {self.source.position.short}"
            if tip.is_genesis:
                self.source.position = tip
            else:
                self.acknowledged.append(tip)
                self.source.accept(tip)
        self.in_flight = None
        self._drop_folded()
        self.check_points()

    def check_points(self) -> None:
        history = self.store.recovery_points(self.source.machine, 0, 10**6 * SECOND_NS)
        for point in history.points[-3:]:
            position = Position.parse(point.position)
            self.source.check(self.store, position)
            assert self.store.position_at(self.source.machine, point.sealed_at_ns).generation >= 1
        last = self.store.last_recovery_point(self.source.machine)
        on_lineage = list(map(Position.parse, (p.position for p in history.points)))
        assert last is None or last in on_lineage
        self.check_sums()

    def check_sums(self) -> None:
        """What is summed up is what is there, indexed or not."""
        machine = self.source.machine
        state = self.store.state(machine)
        spans = [Span(number, 1, WHOLE) for number in sorted(state.generations)]
        entries = [entry for span in spans for entry in self.store.entries(state, span, 10**6)]
        usage = self.store.usage(machine)
        assert (usage.segments, usage.segment_bytes) == (len(entries), sum(e.record_bytes for e in entries))
        headers = [entry.header for entry in entries if entry.header.generation == self.source.position.generation]
        headers = [header for header in headers if self.store.contains(machine, header.position)]
        for after in headers[:: max(1, len(headers) // 3)]:
            later = [header.segment_bytes for header in headers if header.seq > after.seq]
            assert self.store.backlog_bytes(machine, after.position) == (len(later), sum(later))

    def _attempt(self, cut: int | None, act: Any) -> None:
        self.files.cut_after(cut)
        try:
            act()
            self.files.cut_after(None)
        except PowerCut:
            self._power_cut()

    @rule(flags=FLAGS, cut=st.one_of(st.none(), st.integers(1, 8)))
    def put(self, flags: Flags, cut: int | None) -> None:
        raw = self.source.encode(self.source.random_writes(), flags)
        self.in_flight = next(reversed(self.source.sealed))

        def act() -> None:
            position, duplicate = self.store.put_segment(self.source.machine, raw)
            assert not duplicate and position == self.in_flight
            self.acknowledged.append(position)
            self.source.accept(position)

        self._attempt(cut, act)

    @rule(data=st.data())
    def put_again(self, data: st.DataObject) -> None:
        live = self.source.position.generation
        again = [position for position in self.acknowledged if position.generation == live]
        if again:
            position = data.draw(st.sampled_from(again))
            assert self.store.put_segment(self.source.machine, self.source.sealed[position][1]) == (position, True)

    @rule(data=st.data())
    def branch(self, data: st.DataObject) -> None:
        parent = data.draw(st.sampled_from([None, *self.acknowledged[-6:]]))
        self.source.branch(self.store, parent)

    @rule(flags=FLAGS)
    def put_on_a_full_disk(self, flags: Flags) -> None:
        """Taken if there is room in the file, refused before anything is acknowledged if there is not."""
        raw = self.source.encode(self.source.random_writes(), flags)
        self.files.free_bytes = 0
        try:
            position, _ = self.store.put_segment(self.source.machine, raw)
        except StoreFull:
            assert self.store.refusal(self.source.machine) is not None
        else:
            self.acknowledged.append(position)
            self.source.accept(position)
        self.files.free_bytes = None

    @rule(data=st.data(), hold=st.booleans())
    def bookmark(self, data: st.DataObject, hold: bool) -> None:
        points = self.store.recovery_points(self.source.machine, 0, 10**6 * SECOND_NS).points
        positions = [p for p in (Position.parse(point.position) for point in points) if p in self.acknowledged]
        if positions and len(self.held) < 2:
            name, position = f"b{next(self.names)}", data.draw(st.sampled_from(positions))
            self.store.add_bookmark(self.source.machine, name, position, hold=hold)
            if hold:
                self.held[name] = position

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.held:
            name = data.draw(st.sampled_from(sorted(self.held)))
            del self.held[name]
            self.store.hold_bookmark(self.source.machine, name, False)

    @rule(data=st.data())
    def recover(self, data: st.DataObject) -> None:
        points = self.store.recovery_points(self.source.machine, 0, 10**6 * SECOND_NS).points
        if points:
            position = Position.parse(data.draw(st.sampled_from(points)).position)
            disk = data.draw(st.integers(0, len(SIZES) - 1))
            out = self.directory.with_suffix(".raw")
            recover(self.store, self.source.machine, disk, position, out)
            assert out.read_bytes() == self.source.images[position][disk]
            out.unlink()

    @rule(batches=st.integers(0, 2), keep_seconds=st.integers(0, 6))
    def retain_and_pause(self, batches: int, keep_seconds: int) -> None:
        """A fold that is asked to end between two batches: what is offered stays right; the next one goes on."""
        asked = itertools.count()
        now_ns = self.source.seconds * SECOND_NS
        self.store.retain(
            self.source.machine,
            keep_ns=keep_seconds * SECOND_NS,
            now_ns=now_ns,
            pause=lambda _: next(asked) >= batches,
        )
        self._drop_folded()
        self.check_points()

    @rule(keep_seconds=st.integers(0, 12), cut=st.one_of(st.none(), st.integers(1, 25)))
    def retain(self, keep_seconds: int, cut: int | None) -> None:
        machine, end = self.source.machine, 10**6 * SECOND_NS
        before = self.store.recovery_points(machine, 0, end).points
        oldest_ns = (self.source.seconds - keep_seconds) * SECOND_NS

        def act() -> None:
            self.store.retain(machine, keep_ns=keep_seconds * SECOND_NS, now_ns=self.source.seconds * SECOND_NS)

        self._attempt(cut, act)
        after = self.store.recovery_points(machine, 0, end).points
        assert before[len(before) - len(after) :] == after
        for position in self.held.values():
            assert self.store.is_stored(self.store.state(machine), position)
            self.source.check(self.store, position)
        if before and cut is None and not self.held:
            expired = [point for point in before if point.sealed_at_ns <= oldest_ns]
            assert len(after) == min(len(before), len(before) - len(expired) + 1)
        self._drop_folded()
        for point in after[:2]:
            self.source.check(self.store, Position.parse(point.position))

    def _drop_folded(self) -> None:
        state = self.store.state(self.source.machine)
        # A fold that was asked to end has not removed anything yet, but older points are not offered any more.
        gone = [p for p in self.acknowledged if not self.store.is_stored(state, p) or state.is_base(p)]
        for position in gone:
            assert state.is_base(position) or not state.is_offered(position), f"{position.short} is lost"
        self.acknowledged = [p for p in self.acknowledged if p not in gone]

    @rule()
    def flush(self) -> None:
        self.store.flush()

    @rule()
    def power_cut(self) -> None:
        self._power_cut()

    @rule()
    def restart(self) -> None:
        self.store.close()
        self._open()
        self._settle()

    @rule(data=st.data())
    def look(self, data: st.DataObject) -> None:
        if self.acknowledged:
            self.source.check(self.store, data.draw(st.sampled_from(self.acknowledged)))

    @invariant()
    def acknowledged_is_there(self) -> None:
        if hasattr(self, "source"):
            assert self.store.live(self.source.machine) == self.source.position
            for position in self.acknowledged[-4:]:
                assert self.store.read_segment(self.source.machine, position) == self.source.sealed[position][1]

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.abandon()
            shutil.rmtree(self.directory)


TestCrash = CrashMachine.TestCase
TestCrash.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
)
