"""Images that are being read from outside, held at their recovery point for as long as somebody reads them.

    reader (nbdkit, cdp recover) ── PUT, then GET data, GET extents ──► lease ─► ImageReader ─► pins the position
                                                                          └────► cursor ``export-ID``

The open reader keeps retention from folding past its position. The cursor does the same over a restart of the server:
what is found then has one lease's time to be read again, and is reopened by the first read. A lease that runs out ends
both.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import sys
import time
import uuid
from array import array
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from aiohttp import web

from cdp.server import export_messages as x
from cdp.server.errors import ExportDiffers, UnknownExport
from cdp.server.http import PRINCIPAL, Gate, answer, body_of, position, query_int, send_bytes
from cdp.server.workers import ByteBudget, Workers
from cdp.store.errors import UnknownMachine
from cdp.store.image import ImageReader
from journal.errors import BadRequest, CdpError, NoRecoveryPoint, Unavailable
from journal.extent import DISK_BYTES_MAX, DISKS_MAX
from journal.position import Position

if TYPE_CHECKING:
    from cdp.store import Store

EXPORTS_MAX: Final = 256
"""Each holds an image reader: a few hundred bytes, and a position that retention has to respect."""
PREFIX: Final = "export-"
_EXPIRY_POLL_S: Final = 5.0
_ID: Final = re.compile(r"[a-z0-9]{8,32}")

_Key = tuple[uuid.UUID, str]


@dataclass(slots=True, eq=False)
class _Lease:
    """``readers``: requests that are reading; a lease is not ended under them, but when the last one is done."""

    image: ImageReader
    until_s: float
    readers: int = 0
    ending: bool = False


class Exports:
    """Owned by the server's event loop; blocking work goes to its reading threads."""

    def __init__(
        self, store: Store, workers: Workers, budget: ByteBudget, *, clock_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        self._workers = workers
        self._budget = budget
        self._clock_s = clock_s
        self._leases: dict[_Key, _Lease] = {}
        self._left_s: dict[_Key, float] = {}
        """Cursors of exports from before the server's start, and when they end if nobody comes back."""
        self._opening = asyncio.Lock()

    def add_routes(self, gate: Gate) -> None:
        gate.add("PUT", x.EXPORT, self.open, "operator")
        gate.add("DELETE", x.EXPORT, self.end, "operator")
        gate.add("GET", x.EXPORT_DATA, self.data, "operator")
        gate.add("GET", x.EXPORT_EXTENTS, self.extents, "operator")

    async def start(self) -> None:
        """Find what was being exported when the server stopped."""
        found = await self._workers.read(self._find_cursors)
        self._left_s = dict.fromkeys(found, self._clock_s() + x.LEASE_S)

    async def run(self) -> None:
        """End what nobody reads any more, until cancelled."""
        while True:
            await asyncio.sleep(_EXPIRY_POLL_S)
            await self.expire()

    async def close(self) -> None:
        """The cursors stay: a reader goes on where it was after a restart."""
        for lease in self._leases.values():
            lease.image.close()
        self._leases.clear()

    async def expire(self) -> None:
        now_s = self._clock_s()
        over = [key for key, lease in self._leases.items() if lease.until_s < now_s and not lease.readers]
        over += [key for key, until_s in self._left_s.items() if until_s < now_s]
        for machine, export in over:
            await self._end(machine, export)
            await self._workers.write(self._store.audit, "server", "export expired", str(machine), {"export": export})

    # --- requests -----------------------------------------------------------------------------------------------------
    async def open(self, request: web.Request) -> web.StreamResponse:
        machine, export = await self._key(request)
        body = await body_of(request, x.ExportRequest)
        at = position(body.position, "position")
        async with self._opening:
            known = (machine, export) in self._leases
            lease = await self._lease(machine, export, at)
        if lease.image.position != at:
            raise ExportDiffers(
                f"The export {export!r} is of another position.", remedy="Draw another id.", position=body.position
            )
        if not known:
            principal = request[PRINCIPAL]
            details = {"export": export, "position": body.position, "from": request.remote or ""}
            await self._workers.write(self._store.audit, principal.name, "export", str(machine), details)
        held = lease.image.machine
        return answer(
            x.Export(
                machine=str(machine),
                name=held.name,
                id=export,
                position=body.position,
                disks=held.disks,
                lease_s=x.LEASE_S,
            )
        )

    async def end(self, request: web.Request) -> web.StreamResponse:
        """Repeating it changes nothing."""
        await self._end(*await self._key(request))
        return answer({})

    async def data(self, request: web.Request) -> web.StreamResponse:
        disk, offset = _place(request)
        length = query_int(request, "length", 1, x.DATA_BYTES_MAX)
        async with self._reading(request) as image, self._budget.hold(length):
            return await send_bytes(request, await self._workers.read(image.view, disk, offset, length))

    async def extents(self, request: web.Request) -> web.StreamResponse:
        disk, offset = _place(request)
        length = query_int(request, "length", 1, DISK_BYTES_MAX)
        if offset % 512 or length % 512:
            raise BadRequest("Extents are asked for by multiples of 512.", remedy="Round the range.")
        async with self._reading(request) as image:
            return await send_bytes(request, await self._workers.read(_packed_extents, image, disk, offset, length))

    @asynccontextmanager
    async def _reading(self, request: web.Request) -> AsyncIterator[ImageReader]:
        machine, export = await self._key(request)
        lease = self._leases.get((machine, export))
        if lease is None:
            async with self._opening:
                lease = await self._lease(machine, export, None)
        lease.readers += 1
        try:
            yield lease.image
        finally:
            lease.readers -= 1
            lease.until_s = self._clock_s() + x.LEASE_S
            if lease.ending and not lease.readers:
                await self._end(machine, export)

    # --- leases -------------------------------------------------------------------------------------------------------
    async def _lease(self, machine: uuid.UUID, export: str, at: Position | None) -> _Lease:
        """The one that is held, prolonged, or a new one. ``at`` None: only if it is known. Hold ``_opening``."""
        lease = self._leases.get((machine, export))
        if lease is None:
            if len(self._leases) >= EXPORTS_MAX:
                raise Unavailable(f"{EXPORTS_MAX} images are being read already.", remedy="End some of them first.")
            image = await self._workers.read(self._open, machine, export, at)
            lease = self._leases[machine, export] = _Lease(image, 0.0)
            self._left_s.pop((machine, export), None)
        lease.until_s = self._clock_s() + x.LEASE_S
        return lease

    def _open(self, machine: uuid.UUID, export: str, at: Position | None) -> ImageReader:
        wanted = at or self._store.cursor(machine, PREFIX + export)
        if wanted is None:
            raise UnknownExport(
                f"There is no export {export!r}: it was ended, or nobody read it for {x.LEASE_S:.0f} s.",
                remedy="Start it again.",
                export=export,
            )
        if not self._store.is_recovery_point(machine, wanted):
            raise NoRecoveryPoint(
                f"Position {wanted.short} is not a recovery point.",
                remedy="Choose one of those that 'cdp points' lists.",
                position=str(wanted),
            )
        # Pinned before the cursor is set: retention cannot pass in between.
        image = ImageReader(self._store, machine, wanted)
        try:
            self._store.set_cursor(machine, PREFIX + export, wanted)
        except BaseException:
            image.close()
            raise
        return image

    async def _end(self, machine: uuid.UUID, export: str) -> None:
        async with self._opening:
            self._left_s.pop((machine, export), None)
            lease = self._leases.get((machine, export))
            if lease is not None and lease.readers:
                lease.ending = True
                return
            self._leases.pop((machine, export), None)
            await self._workers.write(self._store.remove_cursor, machine, PREFIX + export)
        if lease is not None:
            lease.image.close()

    def _find_cursors(self) -> list[_Key]:
        found: list[_Key] = []
        for machine in self._store.list_machines():
            with suppress(UnknownMachine, CdpError):
                names = [cursor.consumer for cursor in self._store.cursors(machine.uuid)]
                found += [(machine.uuid, name.removeprefix(PREFIX)) for name in names if name.startswith(PREFIX)]
        return found

    async def _key(self, request: web.Request) -> _Key:
        export = request.match_info["id"]
        if _ID.fullmatch(export) is None:
            raise BadRequest("An export's id has 8 to 32 lower case letters and digits.", remedy="Correct the request.")
        return (await self._workers.read(self._store.machine, request.match_info["name"])).uuid, export


def _place(request: web.Request) -> tuple[int, int]:
    return query_int(request, "disk", 0, DISKS_MAX - 1), query_int(request, "offset", 0, DISK_BYTES_MAX)


def _packed_extents(image: ImageReader, disk: int, offset: int, length: int) -> bytes:
    found = image.walk_extents(disk, offset, length)
    packed = array(
        "Q", (size | (x.HOLE if is_hole else 0) for _, size, is_hole in itertools.islice(found, x.EXTENTS_MAX))
    )
    assert packed.itemsize == 8
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()
