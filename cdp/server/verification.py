"""Verifying what is stored: on demand and in the background, with the results kept; and repairing what can be.

    begin ─► a thread reads everything ─► report (a row of the store's settings) ─► repair, if asked for

One machine at a time in the background, at a bounded rate; an operator's order runs beside it, unbounded. Repair, by
what is damaged:

    only the frame of a record, its segment is whole     written anew from the segment itself
    bytes that the newest image needs                    the source sends those ranges again: a resync of them
    where a damaged segment wrote is not known           a new generation on zeros: the source seeds anew
    the index                                            not by itself: 'cdp store restore'
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import msgspec

from cdp.server import proof_messages as pm
from cdp.server.config import Verify
from cdp.server.workers import Changes, Workers
from cdp.store.mend import mend
from cdp.store.verify import Damage, Verified, Verifier
from journal.errors import CdpError
from journal.position import Position
from journal.wire import Progress

if TYPE_CHECKING:
    from cdp.server.control import Hub
    from cdp.store import Store

log = logging.getLogger(__name__)

THREADS: Final = 2
"""One for the background, one for an operator who waits."""
LOOK_S: Final = 60.0
"""How often it is looked for a machine that is due."""
NS: Final = 1e9
LINES_MAX: Final = 100
RESYNC_DEADLINE_S: Final = 30.0
MERGE_BYTES: Final = 1 << 20
"""Ranges are merged over gaps of so much before they are sent as an order, which has to fit into a frame."""
RANGES_MAX: Final = 4096

_REPORT = msgspec.json.Decoder(pm.VerifyReport)


@dataclass(slots=True)
class _Job:
    verifier: Verifier
    began: float
    total_bytes: int
    done_bytes: int = 0
    task: asyncio.Task[pm.VerifyReport] | None = None
    repair: bool = False

    def progress(self) -> Progress:
        passed = max(time.monotonic() - self.began, 1e-3)
        rate = self.done_bytes / passed
        total = max(self.total_bytes, self.done_bytes)
        eta_s = (total - self.done_bytes) / rate if rate else None
        return Progress(what="verify", done_bytes=self.done_bytes, total_bytes=total, bytes_per_s=rate, eta_s=eta_s)


@dataclass(slots=True)
class _Known:
    """What the last run told of a machine. ``segments``: the damaged ones, which no standby can be fed."""

    report: pm.VerifyReport | None = None
    segments: set[tuple[int, int]] = field(default_factory=set)


class Verification:
    def __init__(
        self,
        store: Store,
        workers: Workers,
        changes: Changes,
        hub: Hub,
        config: Verify,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._workers = workers
        self._changes = changes
        self._hub = hub
        self._config = config
        self._clock = clock
        self._threads = ThreadPoolExecutor(THREADS, "verify")
        self._stopping = threading.Event()
        self._jobs: dict[uuid.UUID, _Job] = {}
        self._known: dict[uuid.UUID, _Known] = {}

    async def close(self) -> None:
        self._stopping.set()
        await asyncio.gather(*(job.task for job in self._jobs.values() if job.task), return_exceptions=True)
        await asyncio.to_thread(self._threads.shutdown)

    async def watch(self) -> None:
        """In the background, for ever: whichever machine has waited for the longest."""
        while True:
            machine = await self._workers.read(self._due)
            if machine is None:
                await asyncio.sleep(LOOK_S)
                continue
            await asyncio.wait([self._begin(machine, self._config.mb_per_s_max * 1e6 or None)])

    def begin(self, machine: uuid.UUID, *, repair: bool) -> None:
        """As fast as it goes; hurries what runs in the background already."""
        job = self._jobs.get(machine)
        if job is None:
            self._begin(machine, None)
        self._jobs[machine].verifier.bytes_per_s_max = None
        self._jobs[machine].repair |= repair

    def running(self, machine: uuid.UUID) -> Progress | None:
        job = self._jobs.get(machine)
        return None if job is None else job.progress()

    def last(self, machine: uuid.UUID) -> pm.VerifyReport | None:
        """Reads the store at the first call."""
        return self._of(machine).report

    def damaged_segments(self, machine: uuid.UUID) -> set[tuple[int, int]]:
        """Generation and seq of those that are known to be damaged. From any thread."""
        return self._of(machine).segments

    def found_damaged(self, machine: uuid.UUID, position: Position) -> None:
        """Somebody has read a segment and found it damaged."""
        self._of(machine).segments.add((position.generation, position.seq))

    # --- inside -------------------------------------------------------------------------------------------------------
    def _of(self, machine: uuid.UUID) -> _Known:
        known = self._known.get(machine)
        if known is None:
            raw = self._store.settings.get(_row(machine))
            report = None if raw is None else _REPORT.decode(raw)
            known = self._known.setdefault(machine, _Known(report, _segments(report)))
        return known

    def _due(self) -> uuid.UUID | None:
        """The machine whose last verification is the oldest, if that is older than the interval."""
        if not self._config.interval_h:
            return None
        waiting = []
        for machine in self._store.list_machines():
            report = self.last(machine.uuid)
            # A new machine waits as long as any other: right now it has other things to do.
            since = machine.created_at_ns / NS if report is None else report.ended_s
            waiting.append((since, machine.uuid))
        oldest = min(waiting, default=None, key=lambda row: row[0])
        if oldest is None or self._clock() - oldest[0] < self._config.interval_h * 3600:
            return None
        return oldest[1]

    def _begin(self, machine: uuid.UUID, bytes_per_s_max: float | None) -> asyncio.Task[pm.VerifyReport]:
        job = self._jobs.get(machine)
        if job is None:
            job = _Job(self._verifier(machine, bytes_per_s_max), time.monotonic(), 0)
            self._jobs[machine] = job
            job.task = asyncio.create_task(self._run(machine, job), name=f"verify {machine}")
        assert job.task is not None
        return job.task

    def _verifier(self, machine: uuid.UUID, bytes_per_s_max: float | None) -> Verifier:
        def progress(done_bytes: int) -> None:
            self._jobs[machine].done_bytes = done_bytes

        return Verifier(
            self._store, machine, bytes_per_s_max=bytes_per_s_max, stop=self._stopping.wait, progress=progress
        )

    async def _run(self, machine: uuid.UUID, job: _Job) -> pm.VerifyReport:
        started_s = self._clock()
        try:
            try:
                job.total_bytes = await self._workers.read(self._total_bytes, machine)
                found = await asyncio.get_running_loop().run_in_executor(self._threads, job.verifier.run)
                report = _report(found, started_s, self._clock())
            except CdpError as error:
                report = _failed(error, started_s, self._clock())
            else:
                if job.repair and found.damages:
                    await self._repair(machine, found.damages, report)
            # Whoever sees that nothing runs any more has to see the result, too.
            if report.complete or report.damages or report.error:
                await self._workers.write(self._keep, machine, report)
        finally:
            self._jobs.pop(machine, None)
        if report.damaged:
            log.error("verify: machine %s: %d damages; see 'cdp verify --last'", machine, report.damaged)
        return report

    def _keep(self, machine: uuid.UUID, report: pm.VerifyReport) -> None:
        self._known[machine] = _Known(report, _segments(report))
        self._store.settings.put(_row(machine), msgspec.json.encode(report))

    def _total_bytes(self, machine: uuid.UUID) -> int:
        base = sum(disk.size_bytes for disk in self._store.machine(machine).disks)
        held = self._store.state(machine).base
        return self._store.usage(machine).segment_bytes + (0 if held is None else base)

    async def _repair(self, machine: uuid.UUID, damages: list[Damage], report: pm.VerifyReport) -> None:
        try:
            report.repair = await self._mend(machine, damages)
        except (CdpError, OSError) as error:
            report.error = f"Nothing was repaired: {error}"

    async def _mend(self, machine: uuid.UUID, damages: list[Damage]) -> str:
        """What was done, in words. Raises what the agent's order raises."""
        done = []
        mended = [damage for damage in damages if await self._workers.write(mend, self._store, machine, damage)]
        if mended:
            done.append(f"{len(mended)} records written anew from their own segments")
        left = [damage for damage in damages if damage not in mended and damage.kind in ("segment", "base")]
        if any(damage.lost is None for damage in left):
            await self._workers.write(self._store.start_generation, machine, None, "repair")
            self._changes.notify(machine)
            done.append("the source seeds anew, because what a damaged segment wrote cannot be told any more")
        elif ranges := merged([part for damage in left for part in damage.lost or []]):
            args = {"reason": "repair", "ranges": ranges}
            await self._hub.call(machine, "agent", "resync", args, deadline_s=RESYNC_DEADLINE_S)
            done.append(f"the source sends {sum(length for _, _, length in ranges)} bytes again")
        if any(damage.kind in ("index", "chain") for damage in damages):
            done.append("the index cannot be repaired: 'cdp store restore' it")
        return "; ".join(done) or "nothing that could be repaired is needed"


def merged(ranges: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """In order, neighbours joined, so that at most ``RANGES_MAX`` are left."""
    gap = 0
    while True:
        joined: list[tuple[int, int, int]] = []
        for disk, offset, length in sorted(ranges):
            if joined and joined[-1][0] == disk and offset <= joined[-1][1] + joined[-1][2] + gap:
                start = joined[-1][1]
                joined[-1] = (disk, start, max(joined[-1][2], offset + length - start))
            else:
                joined.append((disk, offset, length))
        if len(joined) <= RANGES_MAX:
            return joined
        gap = gap * 2 or MERGE_BYTES


def _report(found: Verified, started_s: float, ended_s: float) -> pm.VerifyReport:
    damaged = [damage for damage in found.damages if damage.kind != "run"]
    return pm.VerifyReport(
        started_s=started_s,
        ended_s=ended_s,
        complete=found.complete,
        success=found.complete and not damaged,
        segments=found.segments,
        read_bytes=found.read_bytes,
        index_rows=found.index_rows,
        run_files=found.run_files,
        damaged=len(damaged),
        damages=[_line(damage) for damage in found.damages[:LINES_MAX]],
    )


def _failed(error: CdpError, started_s: float, ended_s: float) -> pm.VerifyReport:
    return pm.VerifyReport(
        started_s=started_s,
        ended_s=ended_s,
        complete=False,
        success=False,
        segments=0,
        read_bytes=0,
        index_rows=0,
        run_files=0,
        damaged=0,
        damages=[],
        error=str(error),
    )


def _line(damage: Damage) -> pm.DamageLine:
    return pm.DamageLine(
        kind=damage.kind,
        sentence=damage.sentence,
        position=damage.position,
        first_s=None if damage.first_ns is None else damage.first_ns / NS,
        until_s=None if damage.until_ns is None else damage.until_ns / NS,
        costs=damage.costs,
        lost_bytes=None if damage.lost is None else sum(length for _, _, length in damage.lost),
    )


def _segments(report: pm.VerifyReport | None) -> set[tuple[int, int]]:
    positions = [Position.parse(line.position) for line in report.damages if line.position] if report else []
    return {(position.generation, position.seq) for position in positions}


def _row(machine: uuid.UUID) -> str:
    return f"verify/{machine}"
