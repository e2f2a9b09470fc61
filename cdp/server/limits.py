"""Bandwidth limits of what agents send: rules, each machine's part of the total, and telling it to the agents.

    rules (store) ─┐
    reports (hub) ─┼─► once a second: own rate now, part of the total ─► verb "limit" where it changed, and in each
    bytes stored ──┘                                                     answer to a segment
                                                                         └─► the agent's bucket (``agent/rate.py``)

The total is divided among the connected agents (``schedule.shares``): one that copies or has a backlog wants all it can
get, the others twice what they sent lately, so that a quiet machine's share is not idle and a burst finds room at once
and its full part within some two seconds. Standbys and operators that read are not limited.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import msgspec
from aiohttp import web
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cdp.server import limit_messages as m
from cdp.server.http import PRINCIPAL, Gate, answer, body_of, query_text
from cdp.server.schedule import check_rule, rate_at, shares
from journal.errors import BadRequest, CdpError
from journal.wire import AgentReport

if TYPE_CHECKING:
    from cdp.server.control import Hub
    from cdp.server.workers import Workers
    from cdp.store import Store

log = logging.getLogger(__name__)

BEAT_S: Final = 1.0
TELL_S: Final = 5.0
TELL_FROM: Final = 0.05
"""Changes smaller than this fraction are told with the next answer only."""
BUSY_BYTES: Final = 1 << 20
"""Of backlog: more than a quiet machine ever has."""
QUIET_BYTES_PER_S: Final = 64_000
"""What a machine that sends nothing is thought to want: heartbeats, and the beginning of a burst."""
METER_S: Final = 5.0

_RULES: Final = msgspec.json.Decoder(list[m.LimitRule])
_TOTAL: Final = "limit/total"


class Meter:
    """Bytes per second, over some ``METER_S``."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._level = 0.0
        self._at = clock()

    def add(self, length: int) -> None:
        self._level = self.rate * METER_S + length
        self._at = self._clock()

    @property
    def rate(self) -> float:
        return self._level / METER_S * math.exp((self._at - self._clock()) / METER_S)


class Limits(Collector):
    """``allowance`` and ``rules`` may be asked from any thread; ``run`` belongs to the event loop."""

    def __init__(
        self,
        store: Store,
        workers: Workers,
        hub: Hub,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._workers = workers
        self._hub = hub
        self._clock = clock
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._meters: dict[uuid.UUID, Meter] = {}
        self._allowed: dict[uuid.UUID, int | None] = {}
        self._stale_at = -math.inf
        self._told: dict[uuid.UUID, int | None] = {}
        self._telling: set[uuid.UUID] = set()
        self._rules = {
            key: _RULES.decode(raw) for key, raw in store.settings.items().items() if key.startswith("limit/")
        }

    # --- what is allowed ----------------------------------------------------------------------------------------------
    def rules(self, machine: uuid.UUID | None) -> list[m.LimitRule]:
        """Of a machine, or of the total."""
        return self._rules.get(_key(machine), [])

    def came(self, machine: uuid.UUID, length: int) -> int | None:
        """So much was stored of ``machine``; what it may send from now on, in bytes/s."""
        with self._lock:
            self._meters.setdefault(machine, Meter(self._monotonic)).add(length)
        return self.allowance(machine)

    def allowance(self, machine: uuid.UUID) -> int | None:
        if not self._rules:
            return None
        with self._lock:
            if self._monotonic() >= self._stale_at:
                self._divide()
            if machine in self._allowed:
                return self._allowed[machine]
        # Its control channel is not there yet: as one more among those that are.
        total, own = rate_at(self.rules(None), self._clock()), rate_at(self.rules(machine), self._clock())
        return _lower(own, None if total is None else total // (len(self._allowed) + 1))

    def _divide(self) -> None:
        now_s = self._clock()
        connected = [held.uuid for held in self._store.list_machines() if self._hub.is_connected(held.uuid, "agent")]
        own = {machine: rate_at(self.rules(machine), now_s) for machine in connected}
        total = rate_at(self.rules(None), now_s)
        if total is None:
            self._allowed = own
        else:
            parts = shares(total, {machine: self._want(machine, own[machine]) for machine in connected})
            self._allowed = {machine: _lower(own[machine], parts[machine]) for machine in connected}
        self._stale_at = self._monotonic() + BEAT_S / 2

    def _want(self, machine: uuid.UUID, own: int | None) -> float:
        report = self._hub.state(machine, "agent").report
        busy = isinstance(report, AgentReport) and (report.progress is not None or report.backlog_bytes > BUSY_BYTES)
        want = math.inf if busy else 2 * self._rate(machine) + QUIET_BYTES_PER_S
        return want if own is None else min(want, own)

    def _rate(self, machine: uuid.UUID) -> float:
        meter = self._meters.get(machine)
        return 0.0 if meter is None else meter.rate

    # --- telling it ---------------------------------------------------------------------------------------------------
    async def run(self) -> None:
        """Until cancelled: a large segment may be on its way for minutes, and its answer comes after it."""
        async with asyncio.TaskGroup() as group:
            while True:
                for machine, allowed in self._changed():
                    self._telling.add(machine)
                    group.create_task(self._tell(machine, allowed))
                await asyncio.sleep(BEAT_S)

    def _changed(self) -> list[tuple[uuid.UUID, int | None]]:
        if not self._rules and not self._told:
            return []
        with self._lock:
            self._divide()
            found = [
                (machine, allowed)
                for machine, allowed in self._allowed.items()
                if machine not in self._telling and _differs(self._told.get(machine), allowed)
            ]
            self._told = {machine: told for machine, told in self._told.items() if machine in self._allowed}
        return found

    async def _tell(self, machine: uuid.UUID, allowed: int | None) -> None:
        try:
            with suppress(CdpError):  # it is gone, or will be told with its next answer
                await self._hub.call(machine, "agent", "limit", {"bytes_per_s_max": allowed}, TELL_S)
                self._told[machine] = allowed
        finally:
            self._telling.discard(machine)

    # --- operators ----------------------------------------------------------------------------------------------------
    def add_routes(self, gate: Gate) -> None:
        gate.add("GET", m.LIMITS, self.show, "operator")
        gate.add("PUT", m.LIMIT, self.set, "operator")
        gate.add("DELETE", m.LIMIT, self.remove, "operator")

    async def show(self, _: web.Request) -> web.StreamResponse:
        return answer(await self._workers.read(self.status))

    async def set(self, request: web.Request) -> web.StreamResponse:
        machine = await self._scope(request)
        rule = await body_of(request, m.LimitRule)
        try:
            await self._workers.read(check_rule, rule)  # it may read the time zone's file
        except ValueError as error:
            raise BadRequest(f"The limit is not valid: {error}.", remedy="See 'cdp limit set --help'.") from None
        during = " ".join(rule.during.lower().split())
        rule = msgspec.structs.replace(rule, during=during, time_zone=rule.time_zone if during else "UTC")
        kept = [one for one in self.rules(machine) if not _same(one, rule.during, rule.time_zone)]
        if len(kept) >= m.RULES_MAX:
            raise BadRequest(f"There are {m.RULES_MAX} rules already.", remedy="Remove some: 'cdp limit remove'.")
        await self._change(request, machine, [*kept, rule])
        return answer(await self._workers.read(self.status))

    async def remove(self, request: web.Request) -> web.StreamResponse:
        machine = await self._scope(request)
        kept: list[m.LimitRule] = []
        if "during" in request.query:
            during, zone = " ".join(query_text(request, "during").lower().split()), query_text(request, "time_zone", "")
            kept = [one for one in self.rules(machine) if not _same(one, during, zone or one.time_zone)]
            if len(kept) == len(self.rules(machine)):
                raise BadRequest(f"There is no rule for {during or 'all times'!r}.", remedy="See 'cdp limit show'.")
        await self._change(request, machine, kept)
        return answer(await self._workers.read(self.status))

    async def _scope(self, request: web.Request) -> uuid.UUID | None:
        scope = request.match_info["name"]
        if scope == m.TOTAL:
            return None
        found: uuid.UUID = (await self._workers.read(self._store.machine, scope)).uuid
        return found

    async def _change(self, request: web.Request, machine: uuid.UUID | None, rules: list[m.LimitRule]) -> None:
        key = _key(machine)
        if rules:
            await self._workers.write(self._store.settings.put, key, msgspec.json.encode(rules))
            self._rules[key] = rules
        else:
            await self._workers.write(self._store.settings.delete, key)
            self._rules.pop(key, None)
        self._stale_at = -math.inf
        principal = request[PRINCIPAL]
        details = {"credential": principal.credential, "rules": "; ".join(map(_words, rules)) or "none"}
        subject = "total" if machine is None else str(machine)
        await self._workers.write(self._store.audit, principal.name, "change bandwidth limit", subject, details)

    def status(self) -> m.LimitsAnswer:
        now_s = self._clock()
        return m.LimitsAnswer(
            total_rules=self.rules(None),
            total_bytes_per_s=rate_at(self.rules(None), now_s),
            machines=[
                m.MachineLimit(
                    name=held.name,
                    rules=self.rules(held.uuid),
                    own_bytes_per_s=rate_at(self.rules(held.uuid), now_s),
                    allowed_bytes_per_s=self.allowance(held.uuid),
                    sent_bytes_per_s=int(self._rate(held.uuid)),
                    borrowed_bytes=self._borrowed(held.uuid),
                )
                for held in self._store.list_machines()
            ],
        )

    def _borrowed(self, machine: uuid.UUID) -> int:
        report = self._hub.state(machine, "agent").report
        return report.borrowed_bytes if isinstance(report, AgentReport) else 0

    def collect(self) -> Iterator[Metric]:
        return limit_metrics(self.status().machines)


def limit_metrics(machines: list[m.MachineLimit]) -> Iterator[Metric]:
    allowed = GaugeMetricFamily(
        "cdp_limit_bytes_per_second", "What the machine may send; absent without a limit.", labels=["machine"]
    )
    borrowed = CounterMetricFamily(
        "cdp_limit_borrowed_bytes", "Sent above the limit, to lose no writes.", labels=["machine"]
    )
    for one in machines:
        if one.allowed_bytes_per_s is not None:
            allowed.add_metric([one.name], one.allowed_bytes_per_s)
        borrowed.add_metric([one.name], one.borrowed_bytes)
    yield from (allowed, borrowed)


def _key(machine: uuid.UUID | None) -> str:
    return _TOTAL if machine is None else f"limit/{machine}"


def _lower(one: int | None, other: int | None) -> int | None:
    return min((rate for rate in (one, other) if rate is not None), default=None)


def _differs(told: int | None, allowed: int | None) -> bool:
    if told is None or allowed is None:
        return told != allowed
    return abs(told - allowed) > TELL_FROM * told


def _same(rule: m.LimitRule, during: str, time_zone: str) -> bool:
    return (rule.during, rule.time_zone) == (during, time_zone)


def _words(rule: m.LimitRule) -> str:
    return f"{rule.bytes_per_s} bytes/s {rule.during or 'always'} {rule.time_zone}"
