"""May this segment follow that position? A pure function of values.

With the tip at ``g/s`` (the last segment that was accepted) and the live generation ``g``:

    segment              verdict
    g' < g               StaleGeneration: the writer is fenced
    g' > g               UnknownGeneration
    g, seq = s + 1       EXTENDS if its ``previous`` is the tip's digest, otherwise PositionFork
    g, seq > s + 1       PositionGap
    g, seq <= s          DUPLICATE if the digest is the one known at that seq, otherwise PositionFork
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

from journal.errors import ForeignSegment, PositionFork, PositionGap, StaleGeneration, UnknownGeneration
from journal.position import Position
from journal.segment import Header


class Verdict(Enum):
    EXTENDS = "extends"
    DUPLICATE = "duplicate"


def judge(header: Header, tip: Position, digest_at: Callable[[int], bytes | None]) -> Verdict:
    """The verdict for ``header`` on top of ``tip``, the last position of the live generation (maybe its genesis).

    ``digest_at(seq)`` gives the digest of an older segment of the live generation, or None if it has been folded
    away. Raises one of the typed errors above.
    """
    if header.generation < tip.generation:
        raise StaleGeneration(
            f"Generation {header.generation} has ended; generation {tip.generation} is live.",
            remedy="This machine was taken over, rolled back or seeded anew: it must not push. See 'cdp status'.",
            generation=header.generation,
            live_generation=tip.generation,
        )
    if header.generation > tip.generation:
        raise UnknownGeneration(
            f"Generation {header.generation} has not been started; generation {tip.generation} is live.",
            remedy="Ask the server for the live generation and continue from there.",
            generation=header.generation,
            live_generation=tip.generation,
        )
    if header.seq > tip.seq + 1:
        raise PositionGap(
            f"Segment {header.seq} was sent but {tip.seq + 1} is expected.",
            remedy="Send the missing segments first; if they are lost, start a resync.",
            seq=header.seq,
            expected_seq=tip.seq + 1,
        )
    if header.seq == tip.seq + 1:
        if header.previous != tip.digest:
            raise _fork(header, "its predecessor is not the last stored segment")
        return Verdict.EXTENDS
    known = tip.digest if header.seq == tip.seq else digest_at(header.seq)
    if known != header.digest:
        raise _fork(header, "another segment is stored under that number")
    return Verdict.DUPLICATE


def check_machine(header: Header, machine: object) -> None:
    """Raise ``ForeignSegment`` unless the segment belongs to ``machine`` (a ``uuid.UUID``)."""
    if header.machine != machine:
        raise ForeignSegment(
            f"The segment belongs to machine {header.machine}, not to {machine}.",
            remedy="Check that the agent's state directory was not copied from another machine.",
            machine=str(header.machine),
        )


def _fork(header: Header, why: str) -> PositionFork:
    return PositionFork(
        f"Segment {header.generation}/{header.seq} does not fit the chain: {why}.",
        remedy="Two agents may be pushing for one machine. Stop one, then run a resync.",
        generation=header.generation,
        seq=header.seq,
    )
