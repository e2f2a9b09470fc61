"""Do the source, the store and the standby hold the same, block for block, at one position? While the source writes on.

    source    tells the digests of its disks at a position P of its own choice (``cdp/agent/compare.py``)
    standby   holds before P is chosen, goes on to exactly P, compares its disks with what the source told, goes on
    store     its image at P is compared with the same

    rounds ─► calm ─► standby holds ─► the last round: P, digests ─► store and standby compare ─► report

Nothing is changed by it. What differs is told by ranges: the store's by a resync of the source, the standby's by
seeding it anew.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgspec

from cdp.server import proof_messages as pm
from cdp.server.errors import StandbyBusy
from cdp.server.workers import Workers
from cdp.store import ImageReader
from journal.comparison import Comparison, differing
from journal.errors import BadRequest, CdpError
from journal.position import Position
from journal.wire import Progress

if TYPE_CHECKING:
    from cdp.server.control import Hub
    from cdp.store import Store

log = logging.getLogger(__name__)

POLL_S: Final = 1.0
CALL_S: Final = 20.0
HOLD_S: Final = 60.0
"""For a standby to reach the newest recovery point."""
FINISH_S: Final = 300.0
"""For the last round: some seconds, and for the digests to arrive."""
STANDBY_S: Final = 12 * 3600.0
"""For reading all of the standby's disks."""
NS: Final = 1e9

_REPORT = msgspec.json.Decoder(pm.CompareReport)


@dataclass(slots=True)
class _Job:
    id: str
    phase: str = "the source reads its disks"
    done_bytes: int = 0
    total_bytes: int = 0
    body: bytes = b""
    task: asyncio.Task[None] | None = None


class Comparisons:
    """``check``: raises unless the machine is protected, at rest, and its source is the machine."""

    def __init__(
        self,
        store: Store,
        workers: Workers,
        hub: Hub,
        *,
        check: Callable[[uuid.UUID], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._workers = workers
        self._hub = hub
        self._check = check
        self._clock = clock
        self._jobs: dict[uuid.UUID, _Job] = {}

    async def close(self) -> None:
        tasks = [job.task for job in self._jobs.values() if job.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def begin(self, machine: uuid.UUID, *, standby: bool | None) -> None:
        """Raises ``StandbyBusy``, ``NotProtected``. Joins what runs already."""
        if machine in self._jobs:
            return
        self._check(machine)
        if not self._hub.is_connected(machine, "agent"):
            raise StandbyBusy("The agent is not connected.", remedy="Start it, then repeat the comparison.")
        if standby is None:
            standby = self._hub.is_connected(machine, "pe")
        job = _Job(uuid.uuid4().hex)
        job.total_bytes = sum(disk.size_bytes for disk in self._store.machine(machine).disks)
        self._jobs[machine] = job
        job.task = asyncio.create_task(self._run(machine, job, standby), name=f"compare {machine}")

    def running(self, machine: uuid.UUID) -> tuple[str, Progress | None]:
        job = self._jobs.get(machine)
        if job is None:
            return "", None
        return job.phase, Progress(what="compare", done_bytes=job.done_bytes, total_bytes=job.total_bytes)

    def last(self, machine: uuid.UUID) -> pm.CompareReport | None:
        raw = self._store.settings.get(_row(machine))
        return None if raw is None else _REPORT.decode(raw)

    # --- what the source tells, for the standby ---------------------------------------------------------------------
    def put_body(self, machine: uuid.UUID, comparison: str, body: bytes) -> None:
        self._job(machine, comparison).body = body

    def body(self, machine: uuid.UUID, comparison: str) -> bytes:
        return self._job(machine, comparison).body

    def _job(self, machine: uuid.UUID, comparison: str) -> _Job:
        job = self._jobs.get(machine)
        if job is None or job.id != comparison:
            raise BadRequest("That comparison is over.", remedy="Begin another one: 'cdp compare'.")
        return job

    # --- inside -------------------------------------------------------------------------------------------------------
    async def _run(self, machine: uuid.UUID, job: _Job, standby: bool) -> None:
        started_s = self._clock()
        try:
            try:
                report = await self._compare(machine, job, standby, started_s)
            except CdpError as error:
                report = pm.CompareReport(
                    started_s=started_s,
                    ended_s=self._clock(),
                    success=False,
                    standby=standby,
                    error=error.sentence,
                    remedy=error.remedy,
                )
            # Whoever sees that nothing runs any more has to see the result, too.
            await self._workers.write(self._keep, machine, report)
        finally:
            self._jobs.pop(machine, None)
        if not report.success:
            log.error("compare: machine %s: %s", machine, report.error or f"{report.differing_bytes} bytes differ")

    def _keep(self, machine: uuid.UUID, report: pm.CompareReport) -> None:
        self._store.settings.put(_row(machine), msgspec.json.encode(report))

    async def _compare(self, machine: uuid.UUID, job: _Job, standby: bool, started_s: float) -> pm.CompareReport:
        while not (told := await self._call(machine, "agent", "compare", {"comparison": job.id}, CALL_S))["calm"]:
            job.done_bytes = min(told["done_bytes"], job.total_bytes)
            await asyncio.sleep(POLL_S)
        try:
            if standby:
                job.phase = "the standby holds"
                await self._call(machine, "pe", "compare_hold", {"comparison": job.id}, HOLD_S)
            job.phase = "the source settles"
            args = {"comparison": job.id, "finish": True}
            position = Position.parse((await self._call(machine, "agent", "compare", args, FINISH_S))["position"])
            job.phase, job.done_bytes = "store and standby read", 0
            held = await self._both(machine, job, position, standby)
        finally:
            if standby and self._hub.is_connected(machine, "pe"):
                await self._release(machine, job)
        store, other = held
        return await self._workers.read(self._report, machine, job, position, store, other, started_s)

    async def _both(
        self, machine: uuid.UUID, job: _Job, position: Position, standby: bool
    ) -> tuple[list[tuple[int, int, int]], dict[str, Any] | None]:
        """Differing ranges of the store, and the standby's answer."""
        args = {"comparison": job.id, "position": str(position)}
        reading = asyncio.ensure_future(self._workers.read(self._store_differs, machine, job, position))
        try:
            other = await self._hub.call(machine, "pe", "compare", args, deadline_s=STANDBY_S) if standby else None
            return await reading, other
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    def _store_differs(self, machine: uuid.UUID, job: _Job, position: Position) -> list[tuple[int, int, int]]:
        proof = Comparison.decode(job.body)

        def advance(length: int) -> None:
            job.done_bytes += length

        with ImageReader(self._store, machine, position) as image:
            return [
                (disk, offset, length)
                for disk in sorted(proof.sizes)
                for offset, length in differing(proof, disk, image.read, advance)
            ]

    def _report(  # noqa: PLR0917 (what was found, by everybody)
        self,
        machine: uuid.UUID,
        job: _Job,
        position: Position,
        store: list[tuple[int, int, int]],
        other: dict[str, Any] | None,
        started_s: float,
    ) -> pm.CompareReport:
        proof = Comparison.decode(job.body)
        lines = [pm.Differing(with_what="source", disk=d, offset=o, length=n) for d, o, n in store]
        lost = sum(length for *_, length in store)
        if other is not None:
            lines += [pm.Differing(with_what="standby", disk=d, offset=o, length=n) for d, o, n in other["differing"]]
            lost += other["differing_bytes"]
        point = self._store.is_recovery_point(machine, position)
        return pm.CompareReport(
            started_s=started_s,
            ended_s=self._clock(),
            success=not lost and point,
            position=str(position),
            sealed_at_s=self._store.header(machine, position).sealed_at_ns / NS,
            standby=other is not None,
            compared_bytes=sum(proof.sizes.values()) - proof.unsettled_bytes,
            unsettled_bytes=proof.unsettled_bytes,
            differing_bytes=lost,
            differing=lines[: pm.RANGES_MAX],
            error="" if point else f"{position.short} is not a recovery point.",
            remedy=_remedy(bool(store), bool(lost)),
        )

    async def _release(self, machine: uuid.UUID, job: _Job) -> None:
        try:
            await self._hub.call(machine, "pe", "compare_release", {"comparison": job.id}, deadline_s=CALL_S)
        except CdpError as error:
            log.warning("compare: the standby ends its hold by itself: %s", error)

    async def _call(
        self, machine: uuid.UUID, slot: Any, verb: str, args: dict[str, Any], deadline_s: float
    ) -> dict[str, Any]:
        self._check(machine)
        return await self._hub.call(machine, slot, verb, args, deadline_s=deadline_s)


def _remedy(store: bool, anything: bool) -> str:
    if store:
        return "Run 'cdp verify --repair', then 'cdp compare' again; if it differs still, protect the machine anew."
    return "Run 'cdp compare --reseed': the standby compares its disks with the store." if anything else ""


def _row(machine: uuid.UUID) -> str:
    return f"compare/{machine}"
