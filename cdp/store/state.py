"""The writing end of one machine, and the shape of its history.

Invariants, checked by ``MachineState.check``:

1. ``tip`` is the genesis of the live generation or the last segment of it that is durable.
2. ``pending`` holds exactly the durable segments that the index does not know yet: a gapless run that ends at ``tip``.
3. ``end`` is past every durable record of the current file, and a multiple of ``ALIGN_BYTES``.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Final

from cdp.store.record import ALIGN_BYTES
from cdp.store.records import Base, Entry, Generation, Machine, SegmentFile, Span
from journal.errors import CdpError
from journal.position import SEQ_MAX, Position

WHOLE: Final = SEQ_MAX
"""``last`` of a span that takes all of a generation."""


@dataclass(slots=True, eq=False)
class MachineState:
    """``writing`` is held by whoever changes the history, over slow writes and syncs; ``lock`` is held for the short
    moments in which the fields change or several of them are read together."""

    machine: Machine
    generations: dict[int, Generation]
    tip: Position
    base: Base | None
    writing: threading.RLock = field(default_factory=threading.RLock)
    lock: threading.RLock = field(default_factory=threading.RLock)
    folding: threading.Lock = field(default_factory=threading.Lock)
    """Held over a whole step of retention, before ``writing``."""
    tip_entry: Entry | None = None
    recovery_point: Position | None = None
    file: SegmentFile | None = None
    handle: int = -1
    end: int = 0
    file_segments: int = 0
    pending: dict[int, Entry] = field(default_factory=dict)
    refusal: CdpError | None = None
    """Why the newest segment could not be stored; None once one has been."""
    first_point_ns: int | None = None
    """The oldest recovery point while there is no base image, once it has been looked up."""
    lost_after: Position | None = None
    """Set at start if acknowledged segments that followed it have rotted."""

    @property
    def live(self) -> Generation:
        return self.generations[self.tip.generation]

    def lineage(self, position: Position | None = None) -> list[Span]:
        """The spans that lead to ``position`` (default: the tip), the oldest first. Starts at all-zero disks."""
        spans = []
        at: Position | None = self.tip if position is None else position
        while at is not None:
            spans.append(Span(at.generation, 1, at.seq))
            at = self.generations[at.generation].parent_position
        return spans[::-1]

    def timeline(self) -> list[Span]:
        """The live lineage, and before it the lineages that a new seed has ended."""
        spans = self.lineage()
        while (before := spans[0].generation - 1) in self.generations:
            spans = self.lineage(Position(before, WHOLE, bytes(32))) + spans
        return spans

    def held(self, spans: list[Span]) -> list[Span]:
        """``spans`` from the base image's target on, if that is part of them: what is still offered."""
        return spans if self.base is None else _from(spans, self.base.target_position)

    def unfolded(self, spans: list[Span]) -> list[Span]:
        """``spans`` without what the base image is known to hold: what an image has to be made of, on top of it."""
        folded = None if self.base is None else self.base.folded_position
        return spans if folded is None else _from(spans, folded)

    def root(self, position: Position) -> int:
        """The generation that started on all-zero disks."""
        return self.lineage(position)[0].generation

    def is_offered(self, position: Position) -> bool:
        """Retention has left what the image at ``position`` needs: the base image leads to it, or it is of a lineage
        that was seeded later."""
        if self.base is None:
            return True
        lineage = self.lineage(position)
        return lineage[0].generation > self.base.root or any(self.base.target_position in span for span in lineage)

    def removable(self) -> list[Span]:
        """Segments that nothing on offer needs, once the base image has reached its target."""
        if self.base is None:
            return []
        target = self.base.target_position
        spans = []
        for generation in sorted(self.generations):
            lineage = self.lineage(Position(generation, WHOLE, bytes(32)))
            if target.generation == generation:
                spans.append(Span(generation, 1, target.seq))
            elif lineage[0].generation <= self.base.root and not any(target in span for span in lineage):
                spans.append(Span(generation, 1, WHOLE))
        return spans

    def is_base(self, position: Position) -> bool:
        return self.base is not None and self.base.target == str(position)

    def check(self) -> None:
        assert self.end % ALIGN_BYTES == 0
        assert self.tip.generation == max(self.generations)
        if self.pending:
            assert next(reversed(self.pending)) == self.tip.seq
            assert len(self.pending) == self.tip.seq - next(iter(self.pending)) + 1


def _from(spans: list[Span], position: Position) -> list[Span]:
    for number, span in enumerate(spans):
        if position in span:
            return [Span(span.generation, position.seq + 1, span.last), *spans[number + 1 :]]
    return spans
