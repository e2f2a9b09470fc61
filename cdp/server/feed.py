"""What a standby or a recovery reads: the feed of positions, segments, images and hashes; and a standby's cursor.

The feed with ``until=recovery-point`` ends at the last recovery point that is stored: whatever it lists belongs to a
run that is known to be whole. One answer may end inside such a run, because it is bounded; the rest is there to be
asked for. While the history is fuzzy, that feed is silent and a consistent standby holds.
"""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from aiohttp import web

from cdp.server.http import (
    PRINCIPAL,
    Gate,
    Handler,
    answer,
    body_of,
    integer,
    machine_id,
    position,
    query_int,
    query_position,
    query_seconds,
    query_text,
    send_bytes,
)
from cdp.server.reseed import Reseeds
from cdp.server.workers import ByteBudget, Changes, Workers
from cdp.store.damage import hashes_with_damage
from cdp.store.errors import UnknownPosition
from cdp.store.image import ImageReader
from journal import wire
from journal.errors import BadRequest
from journal.extent import DISK_BYTES_MAX, DISKS_MAX
from journal.position import GENERATION_MAX, SEQ_MAX, Position
from journal.segment import PAYLOAD_BYTES_MAX, SEGMENT_BYTES_MAX, Header

if TYPE_CHECKING:
    from cdp.server.machines import Machines
    from cdp.store import Store

ENTRIES_MAX: Final = 512
"""Entries of one answer: some 80 KB of JSON, a few minutes of history."""
IMAGE_BYTES_MAX: Final = 1 << 40
"""Of disk per image request: holes cost nothing, so only the payload has to be bounded (the store does that)."""
HASHED_BYTES_MAX: Final = 4 << 30
"""Of disk per hash request: some seconds of reading."""
HASHES_MAX: Final = 1 << 17
CHUNK_BYTES_MIN: Final = 4096
CONSUMER_CHARS_MAX: Final = 64


@dataclass(frozen=True, slots=True)
class Range:
    """``[offset, offset + length)`` of one disk, within the limits of the format."""

    disk: int
    offset: int
    length: int


class Feed:
    def __init__(
        self,
        store: Store,
        workers: Workers,
        changes: Changes,
        budget: ByteBudget,
        machines: Machines,
        *,
        wait_s_max: float,
        reseeds: Reseeds,
        damaged: Callable[[uuid.UUID], set[tuple[int, int]]],
    ) -> None:
        """``damaged``: generation and seq of segments that cannot be read."""
        self._store = store
        self._workers = workers
        self._changes = changes
        self._budget = budget
        self._machines = machines
        self._wait_s_max = wait_s_max
        self._reseeds = reseeds
        self._damaged = damaged
        self._closing = False

    def add_routes(self, gate: Gate) -> None:
        gate.add("GET", wire.MACHINE, self.machine, "agent", "pe", "operator")
        gate.add("GET", wire.FEED, self._for_replicas(self.feed), "pe", "operator")
        gate.add("GET", wire.SEGMENT, self._for_replicas(self.segment), "pe", "operator")
        gate.add("GET", wire.IMAGE, self._for_replicas(self.image), "pe", "operator")
        gate.add("GET", wire.HASHES, self._for_replicas(self.hashes), "agent", "pe", "operator")
        gate.add("GET", wire.CURSOR, self.cursor, "pe", "operator")
        gate.add("PUT", wire.CURSOR, self._for_replicas(self.set_cursor), "pe")

    def close(self) -> None:
        """End every long poll now."""
        self._closing = True
        self._changes.wake_all()

    def _for_replicas(self, handler: Handler) -> Handler:
        """A PE that comes up on the disks of a machine that runs from them gets nothing to write there."""

        async def checked(request: web.Request) -> web.StreamResponse:
            if request[PRINCIPAL].role == "pe":
                self._machines.check_replica(machine_id(request))
            return await handler(request)

        return checked

    async def machine(self, request: web.Request) -> web.StreamResponse:
        return answer(await self._workers.read(self._machines.wire_state, machine_id(request)))

    async def feed(self, request: web.Request) -> web.StreamResponse:
        machine = machine_id(request)
        after = query_position(request, "after")
        until = query_text(request, "until", "recovery-point")
        if until not in {"recovery-point", "tip"}:
            raise BadRequest("'until' is 'recovery-point' or 'tip'.", remedy="Correct the request.")
        wait_s = query_seconds(request, "wait_s", self._wait_s_max, 0.0)
        return answer(await self.following(machine, after, to_tip=until == "tip", wait_s=wait_s))

    async def following(self, machine: uuid.UUID, after: Position, *, to_tip: bool, wait_s: float) -> wire.FeedAnswer:
        """What follows ``after``; if that is nothing, waits for it up to ``wait_s``."""
        loop = asyncio.get_running_loop()
        end = loop.time() + wait_s
        while True:
            version = self._changes.version(machine)
            found = await self._workers.read(self._list, machine, after, to_tip)
            left = end - loop.time()
            if found.entries or found.restart or left <= 0 or self._closing:
                return found
            await self._changes.wait(machine, version, left)

    def _list(self, machine: uuid.UUID, after: Position, to_tip: bool) -> wire.FeedAnswer:
        limit = None if to_tip else self._store.last_recovery_point(machine)
        tip = self._store.live(machine)
        try:
            headers = self._store.headers_after(machine, after, ENTRIES_MAX)
        except UnknownPosition:
            return wire.FeedAnswer(entries=[], tip=str(tip), restart=True)
        damaged = self._damaged(machine)
        readable = list(itertools.takewhile(lambda header: (header.generation, header.seq) not in damaged, headers))
        if self._reseeds.pending(machine) or (headers and not readable):
            # Nobody can follow over a damaged segment; comparing leads past it.
            return wire.FeedAnswer(entries=[], tip=str(tip), restart=True)
        headers = readable
        if not to_tip:
            headers = [header for header in headers if limit is not None and header.position <= limit]
        entries = [
            wire.FeedEntry(
                position=str(header.position),
                segment_bytes=header.segment_bytes,
                sealed_at_ns=header.sealed_at_ns,
                recovery_point=header.is_recovery_point,
            )
            for header in headers
        ]
        return wire.FeedAnswer(entries=entries, tip=str(tip))

    async def segment(self, request: web.Request) -> web.StreamResponse:
        machine = machine_id(request)
        generation = integer(request.match_info["generation"], "generation", 1, GENERATION_MAX)
        seq = integer(request.match_info["seq"], "seq", 1, SEQ_MAX)
        entry = await self._workers.read(self.header_of, machine, generation, seq)
        async with self._budget.hold(entry.segment_bytes):
            raw = await self._workers.read(self._store.read_segment, machine, entry.position)
            return await send_bytes(request, raw)

    def header_of(self, machine: uuid.UUID, generation: int, seq: int) -> Header:
        entry = self._store.entry(self._store.state(machine), generation, seq)
        if entry is None:
            raise UnknownPosition(
                f"Segment {generation}/{seq} is not stored.", remedy="Ask the feed what follows your cursor."
            )
        return entry.header

    async def image(self, request: web.Request) -> web.StreamResponse:
        machine = machine_id(request)
        at = query_position(request, "at")
        part = _range(request, IMAGE_BYTES_MAX)
        # The payload is at most one segment's, whatever the range; half of it again for what is being compressed.
        need = min(part.length, PAYLOAD_BYTES_MAX) + (SEGMENT_BYTES_MAX - PAYLOAD_BYTES_MAX)
        async with self._budget.hold(need):
            raw = await self._workers.read(self.image_of, machine, at, part)
            return await send_bytes(request, raw)

    def image_of(self, machine: uuid.UUID, at: Position, part: Range) -> bytes:
        with ImageReader(self._store, machine, at) as image:
            return image.image_segment(part.disk, part.offset, part.length)

    async def hashes(self, request: web.Request) -> web.StreamResponse:
        machine = machine_id(request)
        part = _range(request, HASHED_BYTES_MAX)
        chunk = query_int(request, "chunk", CHUNK_BYTES_MIN, HASHED_BYTES_MAX)
        if part.length > chunk * HASHES_MAX:
            raise BadRequest(f"More than {HASHES_MAX} hashes were asked for at once.", remedy="Ask for a part.")
        async with self._budget.hold(min(chunk, self._budget.limit_bytes)):
            raw = await self._workers.read(self.hashes_of, machine, part, chunk)
        return await send_bytes(request, raw)

    def hashes_of(self, machine: uuid.UUID, part: Range, chunk: int) -> bytes:
        with ImageReader(self._store, machine, self._store.live(machine)) as image:
            return hashes_with_damage(image, (part.disk, part.offset, part.length), chunk)

    async def cursor(self, request: web.Request) -> web.StreamResponse:
        machine = machine_id(request)
        held = await self._workers.read(self._store.cursor, machine, _consumer(request))
        if self._reseeds.pending(machine):
            held = None
        return answer(wire.CursorBody(position=None if held is None else str(held)))

    async def set_cursor(self, request: web.Request) -> web.StreamResponse:
        machine, consumer = machine_id(request), _consumer(request)
        body = await body_of(request, wire.CursorBody)
        if body.position is None:
            await self._workers.write(self._store.remove_cursor, machine, consumer)
            await self._workers.write(self._reseeds.begun, machine)
        else:
            self._reseeds.check(machine)
            at = position(body.position, "position")
            await self._workers.write(self._store.set_cursor, machine, consumer, at)
        return answer(body)


def _range(request: web.Request, length_max: int) -> Range:
    return Range(
        query_int(request, "disk", 0, DISKS_MAX - 1),
        query_int(request, "offset", 0, DISK_BYTES_MAX),
        query_int(request, "length", 1, length_max),
    )


def _consumer(request: web.Request) -> str:
    consumer = request.match_info["consumer"]
    if not (len(consumer) <= CONSUMER_CHARS_MAX and consumer.isascii() and consumer.replace("-", "").isalnum()):
        raise BadRequest("A consumer's name consists of letters, digits and '-'.", remedy="Correct the request.")
    return consumer
