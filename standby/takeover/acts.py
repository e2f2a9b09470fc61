"""How each act is done against the ports. Every one returns its evidence, or raises; every one may be repeated."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from journal.errors import CdpError
from journal.position import Position
from standby.takeover import fence
from standby.takeover.errors import NotReady, SourceAlive, WrongPosition
from standby.takeover.injection import Injection
from standby.takeover.plan import NEVER_CANCELLED, lease_s
from standby.takeover.ports import Ports
from standby.takeover.record import TakeoverRecord
from standby.takeover.states import PHASE_OF, Act, Mode, Outcome

Evidence = dict[str, Any]

LAG_S_MAX = 30.0
"""A planned takeover refuses to begin with a standby further behind: the drain would be downtime."""
REPORT_AGE_S_MAX = 5.0
"""Peers report every second; an older report says nothing about now."""
CHECK_POLL_S = 0.25
PROBE_POLL_S = 0.05
SILENCE_POLL_S_MAX = 1.0
ALIVE_AFTER_S = 3.0
"""A source that has reported all this time, while it was to be silent, is not gone: no use to wait longer."""
SOURCE_READY = frozenset({"following"})
STANDBY_READY = frozenset({"following", "ready"})
PREPARED = "kexec_ready"


class Acts:
    """The acts of one takeover."""

    def __init__(self, record: TakeoverRecord, ports: Ports, save: Callable[[], Awaitable[None]]) -> None:
        self._record = record
        self._ports = ports
        self._spec = record.spec
        self._machine = record.machine
        self._injection = Injection(record, ports, save)
        self._table: dict[Act, Callable[[], Awaitable[Evidence]]] = {
            Act.CHECK: self._check,
            Act.QUIESCE: self._quiesce,
            Act.SEAL: self._seal,
            Act.FENCE_SOURCE: self._fence_source,
            Act.SOURCE_GONE: self._source_gone,
            Act.CUT: self._cut,
            Act.GENERATION: self._generation,
            Act.DRAIN: self._drain,
            Act.INJECT: self._inject,
            Act.TAKE_ADDRESS: self._take_address,
            Act.FINISH_BOOT: self._finish_boot,
            Act.PROBE: self._probe,
            Act.REDEFINE: self._redefine,
            Act.UNFENCE: self._unfence,
            Act.THAW: self._thaw,
            Act.STOP_STANDBY: self._stop_standby,
            Act.GENERATION_BACK: self._generation_back,
            Act.RESTART_STANDBY: self._restart_standby,
        }

    async def do(self, act: Act) -> Evidence:
        return await self._table[act]()

    def deadline_s(self, act: Act) -> float | None:
        """Seconds for one attempt; None where the outcome has to be known, however long it takes."""
        limits = self._spec.deadlines
        if act in NEVER_CANCELLED:
            return None
        return {
            Act.SOURCE_GONE: limits.fence + self._spec.silence_s,
            Act.UNFENCE: limits.fence + limits.quiesce,  # it may start services
            Act.THAW: limits.quiesce,
            Act.REDEFINE: limits.finish_boot,
            Act.STOP_STANDBY: limits.finish_boot,
            Act.RESTART_STANDBY: limits.finish_boot,
        }.get(act) or float(getattr(limits, PHASE_OF[act].replace("-", "_")))

    # --- before the point of no return ------------------------------------------------------------------------------
    async def _check(self) -> Evidence:
        """Ready by the deadline, or ``NotReady`` with what is missing."""
        clock = self._ports.clock
        end = clock.monotonic_s() + self._spec.deadlines.check * 0.9  # leaves time to say why
        while missing := await self._missing():
            if clock.monotonic_s() >= end:
                raise NotReady(
                    "The takeover cannot begin: " + "; ".join(missing) + ".",
                    remedy="Nothing was changed. See 'cdp status' and try again when this is solved.",
                    missing=missing,
                )
            await clock.sleep(CHECK_POLL_S)
        standby = self._ports.pe.seen(self._machine).report
        return {"standby": standby.state if standby else None, PREPARED: bool(standby and standby.kexec_ready)}

    async def _missing(self) -> list[str]:
        planned = self._record.mode is Mode.PLANNED
        missing = await self._missing_at_standby()
        if planned:
            source = self._ports.agent.seen(self._machine)
            if not source.connected or source.report is None or source.silent_s > REPORT_AGE_S_MAX:
                missing.append("the source's agent is not connected")
            elif source.report.state not in SOURCE_READY or source.report.fuzzy:
                fuzzy = " and its history is fuzzy" if source.report.fuzzy else ""
                missing.append(f"the source's agent is {source.report.state}{fuzzy}")
        live = await self._ports.store.live(self._machine)
        if live.generation != self._record.generation - 1:
            missing.append(f"generation {live.generation} was started meanwhile")
        if await self._ports.store.last_recovery_point(self._machine) is None:
            missing.append("there is no recovery point yet")
        return missing

    async def _missing_at_standby(self) -> list[str]:
        planned = self._record.mode is Mode.PLANNED
        if self._spec.standby is None:
            return ["the machine has no standby"]
        missing = []
        if (state := await self._ports.hypervisor.state(self._spec)) != "running":
            missing.append(f"the standby's domain is {state}")
        seen = self._ports.pe.seen(self._machine)
        report = seen.report
        if not seen.connected or report is None or seen.silent_s > REPORT_AGE_S_MAX:
            return [*missing, "the standby's PE is not connected"]
        if report.state not in STANDBY_READY:
            missing.append(f"the standby is {report.state}")
        if report.applied is None:
            missing.append("the standby is not consistent yet")
        if planned and not report.kexec_ready:
            missing.append("the standby has not prepared the replicated kernel")
        if planned and report.applied_at_s is not None:
            lag_s = self._ports.clock.now_s() - report.applied_at_s
            if lag_s > LAG_S_MAX:
                missing.append(f"the standby is {lag_s:.0f} s behind")
        return missing

    async def _quiesce(self) -> Evidence:
        await self._ports.agent.quiesce(self._machine, self._spec.quiesce, lease_s(self._spec))
        return {"mode": self._spec.quiesce}

    async def _seal(self) -> Evidence:
        position = await self._ports.agent.seal(self._machine)
        if position.generation != self._record.generation - 1:
            raise WrongPosition(
                f"The source sealed {position.short}, but generation {self._record.generation - 1} is live.",
                remedy="Look at the source's agent: it follows another history.",
                position=str(position),
            )
        return {"position": str(position)}

    async def _fence_source(self) -> Evidence:
        addresses = self._spec.service_addresses
        ending = self._record.generation - 1
        evidence = await self._ports.agent.fence(self._machine, ending, addresses)
        fence.check_source_fenced(evidence, addresses)
        return evidence

    async def _source_gone(self) -> Evidence:
        """Wait for the silence that is required, then ask the addresses; see ``fence``."""
        options, spec = self._record.options, self._spec
        destroyed = spec.source_domain is not None
        if spec.source_domain is not None:
            await self._ports.hypervisor.destroy_source(spec.source_domain)
        while True:
            silent_s = self._ports.agent.seen(self._machine).silent_s
            evidence = fence.SourceEvidence(silent_s, destroyed, None)
            left_s = fence.silence_left_s(evidence, spec.silence_s, options)
            if left_s == 0:
                break
            if self._waited_s() - silent_s > ALIVE_AFTER_S:
                fence.check_source_gone(evidence, spec.silence_s, options)
            await self._ports.clock.sleep(min(left_s, SILENCE_POLL_S_MAX))
        answering = await self._ports.probe.answering(spec.service_hosts, spec.probes)
        evidence = fence.SourceEvidence(self._ports.agent.seen(self._machine).silent_s, destroyed, answering)
        fence.check_source_gone(evidence, spec.silence_s, options)
        return evidence.as_dict()

    def _waited_s(self) -> float:
        entry = self._record.last(Act.SOURCE_GONE)
        return 0.0 if entry is None else self._ports.clock.now_s() - entry.started_s

    async def _cut(self) -> Evidence:
        """Where the source's history ends: its last recovery point, which nothing can follow any more."""
        position = await self._ports.store.last_recovery_point(self._machine)
        if position is None:
            raise NotReady("There is no recovery point.", remedy="Only a seed that was completed can be taken over.")
        sealed = self._record.last(Act.SEAL)
        if sealed is not None and position < Position.parse(sealed.evidence["position"]):
            raise WrongPosition(
                f"The last recovery point is {position.short}, older than what the source sealed.",
                remedy="See 'cdp status' for losses of the capture, and try again.",
                position=str(position),
            )
        return {"position": str(position)}

    async def _generation(self) -> Evidence:
        record = self._record
        genesis = await self._ports.store.start_generation(
            self._machine, record.generation, self._cut_position(), f"takeover {record.id}"
        )
        return {"genesis": str(genesis)}

    # --- after it ---------------------------------------------------------------------------------------------------
    def _cut_position(self) -> Position:
        position = self._record.cut_position
        assert position is not None, "the planner starts this act after the cut only"
        return position

    async def _drain(self) -> Evidence:
        want = self._cut_position()
        applied = await self._ports.pe.drain(self._machine, self._record.id, want)
        if applied != want:
            raise WrongPosition(
                f"The standby applied {applied.short} instead of {want.short}.",
                remedy="The standby follows another history; remove and define it again.",
                applied=str(applied),
                wanted=str(want),
            )
        return {"position": str(applied)}

    async def _inject(self) -> Evidence:
        await self._drain()  # a PE that was restarted since is at the cut, but not drained
        injected = await self._ports.pe.inject(self._machine, self._record.id, self._spec)
        return {"injected": injected} | self._injection.made()

    async def _take_address(self) -> Evidence:
        addresses = self._spec.service_addresses
        held = await self._ports.pe.take_address(self._machine, self._record.id, addresses, self._record.options.force)
        fence.check_held(held, addresses)
        return {"held": held}

    async def _finish_boot(self) -> Evidence:
        """Answered, or the PE is gone after it was told: only the probe can say more."""
        again = any(
            entry.act is Act.FINISH_BOOT and entry.outcome is Outcome.INTERRUPTED for entry in self._record.entries
        )
        if again and not self._ports.pe.seen(self._machine).connected:
            return {"assumed": "the PE left before the controller was restarted"}
        try:
            await self._injection.start()
        except (CdpError, OSError, TimeoutError) as error:
            if isinstance(error, CdpError) and not error.transient:
                raise
            if self._ports.pe.seen(self._machine).connected:
                raise
            return {"assumed": f"the PE left without an answer: {error}"}
        return {}

    async def _probe(self) -> Evidence:
        """Every probe answers at every service address; without probes, the replicated agent says that it is up."""
        waiting = "the replicated agent has not reported"
        began_s = self._ports.clock.monotonic_s()
        while True:
            await self._injection.check_left(self._ports.clock.monotonic_s() - began_s)
            self._check_pe_alive()
            up = self._ports.agent.system_up(self._machine, self._record.id)
            seen = await self._not_serving()
            if seen is None and (up or self._spec.probes):
                return {"system_up": up, "probes": [str(probe) for probe in self._spec.probes]}
            waiting = seen or waiting
            last = self._record.last(Act.PROBE)
            if last is not None:
                last.evidence |= {"waiting_for": waiting}
            await self._ports.clock.sleep(PROBE_POLL_S)

    async def _not_serving(self) -> str | None:
        for address in self._spec.service_hosts:
            for probe in self._spec.probes:
                if (seen := await self._ports.probe.serving(address, probe)) is not None:
                    return f"{probe} at {address}: {seen}"
        return None

    def _check_pe_alive(self) -> None:
        """A PE that is still there and says that it failed will not boot by itself."""
        seen = self._ports.pe.seen(self._machine)
        if self._record.pending(Act.REDEFINE):
            return  # it may only have been restarted, which is asked when this is over
        if seen.connected and seen.report is not None and seen.report.state == "failed" and seen.silent_s < 1.0:
            error = seen.report.error or {}
            raise NotReady(
                f"The standby failed to boot: {error.get('sentence', 'no reason given')}",
                remedy=str(error.get("remedy", "See the standby's console.")),
            )

    async def _redefine(self) -> Evidence:
        await self._ports.hypervisor.redefine_for_disk(self._spec)
        return {}

    # --- the ways back ----------------------------------------------------------------------------------------------
    async def _unfence(self) -> Evidence:
        tip = await self._ports.store.live(self._machine)
        await self._ports.agent.unfence(self._machine, tip.generation, tip, self._spec.service_addresses)
        return {"generation": tip.generation}

    async def _thaw(self) -> Evidence:
        await self._ports.agent.thaw(self._machine)
        return {}

    async def _stop_standby(self) -> Evidence:
        await self._ports.hypervisor.destroy(self._spec)
        state = await self._ports.hypervisor.state(self._spec)
        if state == "running":
            raise SourceAlive(
                "The standby is still running after it was powered off.",
                remedy="Power its domain off by hand ('virsh destroy'), then retry.",
                state=state,
            )
        return {"state": state}

    async def _generation_back(self) -> Evidence:
        """On top of the cut: what was written on the standby is left behind."""
        record = self._record
        genesis = await self._ports.store.start_generation(
            self._machine, record.generation + 1, self._cut_position(), f"rollback of takeover {record.id}"
        )
        return {"genesis": str(genesis)}

    async def _restart_standby(self) -> Evidence:
        """Cursor first: a PE that found it would take the written disk for the cut."""
        await self._ports.store.forget_standby(self._machine)
        await self._ports.hypervisor.start_pe(self._spec)
        return {}


def describe(error: BaseException) -> dict[str, Any]:
    """Any error as a record keeps it."""
    if isinstance(error, CdpError):
        # Through JSON, so that no field can keep the record from being stored.
        body: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(error.as_dict(), enc_hook=str))
        return body
    return {
        "code": "unexpected",
        "sentence": f"{type(error).__name__}: {error}",
        "remedy": "See the server's log.",
        "fields": {},
    }
