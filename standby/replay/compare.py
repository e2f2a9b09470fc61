"""The standby's part of a comparison: hold at a position, compare the disks with what the source told, go on.

    hold ──► compare ──► release            following ─ drained at the position ─ following

The server has the standby hold before it knows the position, because a standby that is not held would pass it. A hold
ends by itself when the server does not ask for ``LEASE_S``, and at once when a takeover drains the standby: that one
keeps the disks where they are, or moves them on.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Final, Protocol

import msgspec

from journal.comparison import Comparison, differing
from journal.errors import BadRequest, CdpError
from journal.position import Position
from journal.wire import Progress
from standby.replay.apply import target_failed
from standby.replay.arguments import parsed
from standby.replay.follow import Follower
from standby.replay.ports import Clock, Disk, Offload

LEASE_S: Final = 60.0
LOOK_S: Final = 1.0
DIFFERING_MAX: Final = 1000
"""Ranges in one answer; a standby with more of them is seeded anew, whichever they are."""


class ComparisonInterrupted(CdpError):
    """The standby had to move on, for a takeover."""

    code = "comparison-interrupted"
    http_status = 409


class Comparisons(Protocol):
    async def comparison(self, comparison: str) -> bytes | bytearray:
        """What the source told, as it encoded it."""
        ...


class _Args(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    comparison: str


class CompareArgs(_Args):
    position: str


class StandbyComparison:
    """Its ``verbs`` are the server's to call; ``watch`` is one task of the process."""

    def __init__(
        self,
        follower: Follower,
        transport: Comparisons,
        disks: Mapping[int, Disk],
        *,
        clock: Clock,
        offload: Offload,
    ) -> None:
        self._follower = follower
        self._transport = transport
        self._disks = disks
        self._clock = clock
        self._offload = offload
        self._held = ""
        self._until = 0.0
        self.progress: Progress | None = None

    def verbs(self) -> dict[str, Any]:
        return {"compare_hold": self.hold, "compare": self.compare, "compare_release": self.release}

    @property
    def holding(self) -> bool:
        return bool(self._held)

    def give_up(self) -> None:
        """A takeover has the standby from here on: it stays where it is."""
        self._held = ""

    async def hold(self, raw: dict[str, Any]) -> dict[str, Any]:
        """Stop at the newest recovery point. Raises ``DrainRefused``, ``ComparisonInterrupted``."""
        args = parsed(raw, _Args)
        if not self._held and self._follower.status().state in ("draining", "drained"):
            raise self._interrupted()  # a takeover was first
        self._extend(args.comparison)
        return {"applied": str(await self._drained(args.comparison, None))}

    async def compare(self, raw: dict[str, Any]) -> dict[str, Any]:
        """Go on to exactly ``position``, compare there, and follow again. ``hold`` comes first; raises
        ``ComparisonInterrupted`` if the hold has ended meanwhile."""
        args = parsed(raw, CompareArgs)
        if self._held != args.comparison:
            raise self._interrupted()
        self._extend(args.comparison)
        position = Position.parse(args.position)
        try:
            await self._drained(args.comparison, position)
            proof = _told(await self._transport.comparison(args.comparison), position)
            found: list[tuple[int, int, int]] = []
            self.progress = Progress(what="compare", done_bytes=0, total_bytes=sum(proof.sizes.values()))
            for disk in sorted(proof.sizes):
                for offset, length in await self._offload(partial(self._differing, proof, disk)):
                    found.append((disk, offset, length))
            self._check(args.comparison, position)
        finally:
            self.progress = None
            self._release(args.comparison)
        return {
            "compared_bytes": sum(proof.sizes.values()) - proof.unsettled_bytes,
            "differing_bytes": sum(length for *_, length in found),
            "differing": found[:DIFFERING_MAX],
        }

    async def release(self, raw: dict[str, Any]) -> dict[str, Any]:
        self._release(parsed(raw, _Args).comparison)
        return {}

    async def watch(self) -> None:
        """Until cancelled: end a hold that nobody asks for any more."""
        while True:
            await self._clock.sleep(LOOK_S)
            if self._held and self.progress is None and self._clock.monotonic() > self._until:
                self._release(self._held)

    async def _drained(self, comparison: str, target: Position | None) -> Position:
        try:
            reached = await self._follower.drain(target)
        except CdpError:
            self._release(comparison)
            raise
        self._check(comparison, reached)
        return reached

    def _check(self, comparison: str, position: Position) -> None:
        now = self._follower.status()
        if self._held != comparison or now.state != "drained" or now.applied != position:
            raise self._interrupted()

    def _interrupted(self) -> ComparisonInterrupted:
        return ComparisonInterrupted(
            "The standby had to move on while it was being compared.",
            remedy="Repeat the comparison when no takeover is under way.",
            state=self._follower.status().state,
        )

    def _extend(self, comparison: str) -> None:
        self._held, self._until = comparison, self._clock.monotonic() + LEASE_S

    def _release(self, comparison: str) -> None:
        if self._held == comparison:
            self._held = ""
            self._follower.resume()

    def _differing(self, proof: Comparison, disk: int) -> list[tuple[int, int]]:
        def read(number: int, offset: int, length: int) -> memoryview:
            try:
                return self._disks[number].read(offset, length)
            except OSError as error:
                raise target_failed(error) from error

        def advance(length: int) -> None:
            assert self.progress is not None
            self.progress = msgspec.structs.replace(self.progress, done_bytes=self.progress.done_bytes + length)

        return list(differing(proof, disk, read, advance))


def _told(raw: bytes | bytearray, position: Position) -> Comparison:
    try:
        proof = Comparison.decode(raw)
        if Position.parse(proof.position) != position:
            raise ValueError("it is of another position")
    except ValueError as error:
        raise BadRequest(f"What the source told cannot be read: {error}.", remedy="Repeat the comparison.") from error
    return proof
