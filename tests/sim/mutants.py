"""Bugs that somebody might write one day, each in the class that it would be written in. The simulation finds them."""

from __future__ import annotations

import uuid
from functools import partial
from typing import Final

from cdp.agent.push import Pusher
from cdp.server.feed import Feed
from journal import wire
from journal.errors import CdpError
from journal.position import Position
from journal.wire import FeedEntry
from standby.replay.ahead import Ahead
from standby.replay.follow import Follower
from standby.replay.ports import Until
from standby.replay.retry import undamaged
from tests.sim.disk import CachedDisk
from tests.sim.world import Parts
from tests.store.faulty import FaultyFiles


class NeverSynced(FaultyFiles):
    def sync(self, handle: int) -> None:
        return


class PastTheRecoveryPoint(Feed):
    def _list(self, machine: uuid.UUID, after: Position, to_tip: bool) -> wire.FeedAnswer:
        return super()._list(machine, after, to_tip=True)


class SkipsOnError(Pusher):
    def _fail(self, error: CdpError) -> None:
        super()._fail(error)
        if self._spool.entries:
            self._spool.acknowledged(self._spool.entries[0].position)


class CursorFirst(Follower):
    async def _ack(self) -> None:
        assert self._unacked is not None
        await self._transport.ack(self._unacked)
        await super()._ack()


class LendsQuietly(Follower):
    async def lend(self) -> None:
        assert self._state == "drained"
        self._lent = True


class ConsistentTooSoon(Follower):
    def _settle(self, position: Position, consistent_from: Position, until: Until) -> None:
        super()._settle(position, position, until)


class FollowsToTheTip(Follower):
    """Found by the simulation when it was new: after a seed, a list up to the tip was applied to its end."""

    async def _apply_entries(self, entries: list[FeedEntry]) -> None:
        async with Ahead(self._transport, entries) as ahead:
            for number, entry in enumerate(entries):
                header = await undamaged(partial(self._apply_one, ahead, entry), self._clock)
                if header.is_recovery_point:
                    await self._at_recovery_point(due=number == len(entries) - 1)
                if self._target is not None and self._state != "draining":
                    return


class KeepsDiscarded(CachedDisk):
    def discard(self, offset: int, length: int) -> None:
        return


MUTANTS: Final = {
    "a segment is acknowledged before it is synced": Parts(files=NeverSynced),
    "the feed serves past the last recovery point": Parts(feed=PastTheRecoveryPoint),
    "the pusher skips a segment after an error": Parts(pusher=SkipsOnError),
    "the cursor is written before the flush": Parts(follower=CursorFirst),
    "disks are lent while a cursor vouches for them": Parts(follower=LendsQuietly),
    "a seed counts as consistent at its start": Parts(follower=ConsistentTooSoon),
    "after a seed, everything up to the tip is applied": Parts(follower=FollowsToTheTip),
    "a discard leaves the old content": Parts(disk=KeepsDiscarded),
}
