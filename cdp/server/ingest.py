"""PUT of a segment: received into bounded memory, checked and made durable by the store, then acknowledged.

    Content-Length ─► budget ─► body ─► store (thread: verify, chain, fdatasync, index) ─► answer ─► feed wakes up

The body is read only when its bytes fit the budget: when the disk is slower than the senders, they wait in TCP.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING

from aiohttp import web

from cdp.server.errors import BodyTooLarge
from cdp.server.http import Gate, answer, integer, machine_id
from cdp.server.workers import ByteBudget, Changes, Workers
from journal import wire
from journal.errors import BadRequest, Unavailable
from journal.position import GENERATION_MAX, SEQ_MAX, Position
from journal.segment import HEADER_BYTES, SEGMENT_BYTES_MAX, Header, damaged

if TYPE_CHECKING:
    from cdp.server.metrics import Counters
    from cdp.store import Store


class Ingest:
    def __init__(
        self,
        store: Store,
        workers: Workers,
        changes: Changes,
        budget: ByteBudget,
        counters: Counters,
        *,
        request_idle_s: float,
        came: Callable[[uuid.UUID, int], int | None] = lambda _machine, _length: None,
    ) -> None:
        """``came``: told what was stored; says how many bytes/s the machine may send."""
        self._store = store
        self._workers = workers
        self._changes = changes
        self._budget = budget
        self._counters = counters
        self._request_idle_s = request_idle_s
        self._came = came

    def add_routes(self, gate: Gate) -> None:
        gate.add("PUT", wire.SEGMENT, self.put, "agent")

    async def put(self, request: web.Request) -> web.StreamResponse:
        machine = machine_id(request)
        generation = integer(request.match_info["generation"], "generation", 1, GENERATION_MAX)
        seq = integer(request.match_info["seq"], "seq", 1, SEQ_MAX)
        length = _length(request)
        async with self._budget.hold(length):
            raw = await self._receive(request, length)
            return answer(await self.take(machine, generation, seq, raw))

    async def take(self, machine: uuid.UUID, generation: int, seq: int, raw: bytearray) -> wire.StoredAnswer:
        """Store a segment that arrived whole; durable on return."""
        started = time.monotonic()
        stored, duplicate = await self._workers.write(self._put, machine, generation, seq, raw)
        self._counters.stored(machine, len(raw), time.monotonic() - started, duplicate=duplicate)
        self._changes.notify(machine)
        return wire.StoredAnswer(
            position=str(stored), duplicate=duplicate, bytes_per_s_max=self._came(machine, len(raw))
        )

    def _put(self, machine: uuid.UUID, generation: int, seq: int, raw: bytearray) -> tuple[Position, bool]:
        header = Header.unpack(memoryview(raw)[:HEADER_BYTES])
        if (header.generation, header.seq) != (generation, seq):
            raise BadRequest(
                f"The path names segment {generation}/{seq}, the body is {header.generation}/{header.seq}.",
                remedy="The sender is broken: upgrade it.",
            )
        return self._store.put_segment(machine, raw)

    async def _receive(self, request: web.Request, length: int) -> bytearray:
        raw = bytearray(length)
        at = 0
        try:
            async with asyncio.timeout(self._request_idle_s) as idle:
                async for chunk in request.content.iter_any():
                    if at + len(chunk) > length:
                        raise damaged("The body is longer than announced.")
                    raw[at : at + len(chunk)] = chunk
                    at += len(chunk)
                    idle.reschedule(asyncio.get_running_loop().time() + self._request_idle_s)
        except TimeoutError:
            raise Unavailable(
                f"The body stopped after {at} of {length} bytes.", remedy="Check the network, then send it again."
            ) from None
        if at != length:
            raise damaged(f"The body ended after {at} of {length} bytes.")
        return raw


def _length(request: web.Request) -> int:
    """The announced length, which bounds the memory before a byte is read."""
    length = request.content_length
    if length is None or request.headers.get("Content-Encoding"):
        raise BadRequest("A segment is sent with its length, unencoded.", remedy="Send a Content-Length.")
    if length > SEGMENT_BYTES_MAX:
        raise BodyTooLarge(
            f"A segment has at most {SEGMENT_BYTES_MAX} bytes, this one announces {length}.",
            remedy="The sender is broken: upgrade it.",
        )
    if length < HEADER_BYTES:
        raise damaged(f"A segment has at least {HEADER_BYTES} bytes, this one announces {length}.")
    return length
