"""Any sequence of puts, branches, flushes and power cuts at any durable step: what was acknowledged is there, and every
recovery point that is offered is the image that the source had."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cdp.store import Store
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
        self._open()
        self.source = make(self.store, *SIZES, seed=seed)

    def _open(self) -> None:
        self.seed += 1
        self.files = FaultyFiles(self.seed)
        self.store = Store.open(
            self.directory, file_bytes=48 << 10, map_bytes=8 << 20, flush_interval_s=1e6, fs=self.files
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
        if before and cut is None:
            expired = [point for point in before if point.sealed_at_ns <= oldest_ns]
            assert len(after) == min(len(before), len(before) - len(expired) + 1)
        self._drop_folded()
        for point in after[:2]:
            self.source.check(self.store, Position.parse(point.position))

    def _drop_folded(self) -> None:
        state = self.store.state(self.source.machine)
        gone = [p for p in self.acknowledged if self.store.entry(state, p.generation, p.seq) is None]
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
