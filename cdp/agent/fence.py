"""This side of the fence: giving the service addresses up for good, and taking them back.

    fence     note it durably · take the addresses off     answered when both are done: only then is it a fence
    guard     at every start, before the network serves: what is noted is enforced again
    unfence   put the addresses back · delete the note     last, so that a crash leaves this side fenced

Writers that nothing else can stop (quiesce mode none) are stopped by taking the addresses away: nobody hears of what
they commit after that. Their fence has two steps, so that what was acknowledged before is part of the history:

    sealing   noted · addresses off · the last segment is sealed and stored · only then the fence as above

An agent that learns that it was superseded (the server started a newer generation for the other side) fences itself the
same way, with the addresses that the server last told it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cdp.agent.state import Fence, Mode, StateDir
from cdp.agent.takenover import takeover_id
from journal.position import Position

if TYPE_CHECKING:
    from standby.takeover.address import Evidence

log = logging.getLogger(__name__)


# Netlink costs half a second of start-up (several on an emulated CPU) and 20 MB: it is loaded in a thread, on the day
# that it is needed; in a planned takeover while the services stop, so that the fence does not wait for it.
def load_netlink() -> None:
    from standby.takeover import address  # noqa: F401, PLC0415


def remove_addresses(addresses: Sequence[str]) -> Evidence:
    from standby.takeover import address  # noqa: PLC0415

    return address.remove(addresses)


def add_addresses(
    addresses: Sequence[str], device: str | None = None, lost_routes: Sequence[dict[str, Any]] = ()
) -> dict[str, str]:
    from standby.takeover import address  # noqa: PLC0415

    return address.add(addresses, device, lost_routes)


def announce_addresses(addresses: Sequence[str]) -> None:
    """Tell the neighbours where the addresses are now, several times within seconds."""
    from standby.takeover import address  # noqa: PLC0415

    for text, device in address.holds(addresses).items():
        address.announce([text], device)


class Fencer:
    """The note is the truth; ``self.fence`` mirrors it."""

    def __init__(self, state: StateDir) -> None:
        self._state = state
        self.fence: Fence | None = state.fence()

    @property
    def whole(self) -> bool:
        """Nothing is sealed and pushed any more."""
        return self.fence is not None and not self.fence.sealing

    async def raise_(
        self,
        generation: int,
        addresses: Sequence[str],
        tip: Position | None,
        quiesced: Mode | None,
        *,
        sealing: bool = False,
    ) -> dict[str, Any]:
        """Fence this machine. The evidence, JSON-serialisable: ``removed``, ``absent``, ``remaining``, …"""
        before = self.fence
        fence = Fence(
            generation=generation,
            addresses=list(addresses),
            tip=None if tip is None else str(tip),
            quiesced=quiesced or (None if before is None else before.quiesced),
            removed=[] if before is None else before.removed,
            devices={} if before is None else before.devices,
            routes=[] if before is None else before.routes,
            sealing=sealing,
        )
        self.fence = fence
        _, evidence = await asyncio.gather(
            asyncio.to_thread(self._state.save_fence, fence), asyncio.to_thread(remove_addresses, addresses)
        )
        await self._note(evidence)
        log.warning("fenced for generation %d: removed %s", generation, ", ".join(evidence.removed) or "no address")
        return evidence.as_dict() | {"removed": sorted({*fence.removed, *evidence.removed})}

    async def enforce(self) -> None:
        """Take off whatever has come back: a network manager may restore what it was configured with."""
        if self.fence is not None:
            await self._note(await asyncio.to_thread(remove_addresses, self.fence.addresses))

    async def lift(self, addresses: Sequence[str]) -> None:
        """Put the addresses back where they were. The note is deleted by ``forget``, when all else is done."""
        fence = self.fence
        if fence is None:
            return
        by_device: dict[str | None, list[str]] = {}
        where = {text.partition("/")[0]: device for text, device in fence.devices.items()}
        for text in addresses:
            by_device.setdefault(where.get(text.partition("/")[0]), []).append(text)
        for device, mine in by_device.items():
            await asyncio.to_thread(add_addresses, mine, device, fence.routes)

    async def forget(self) -> None:
        await asyncio.to_thread(self._state.save_fence, None)
        self.fence = None

    async def _note(self, evidence: Evidence) -> None:
        """Remember what was taken off, to be able to undo it."""
        fence = self.fence
        if fence is None or not evidence.removed:
            return
        fence.removed = sorted({*fence.removed, *evidence.removed})
        fence.devices |= evidence.devices
        fence.routes += evidence.routes
        await asyncio.to_thread(self._state.save_fence, fence)


def guard(state: StateDir) -> Evidence | None:
    """For the boot guard (``cdp agent guard``): enforce the fence, without an agent. None if there is none, or if it is
    the source's and this is the machine that a takeover made from its disk."""
    fence = state.fence()
    return None if fence is None or takeover_id() is not None else remove_addresses(fence.addresses)
