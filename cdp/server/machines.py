"""What the server knows about each machine: its specification, its watermarks, and what is wrong with it.

Durable: the specification (a row of the store's ``settings``). In memory: what its agent and its standby reported last
(the hub keeps it). Everything here is called from worker threads and reads the store.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

import msgspec

from cdp.server.errors import DisksChanged
from cdp.server.messages import (
    AgentStatus,
    JournalStatus,
    MachineStatus,
    PeerStatus,
    ProtectRequest,
    StageStatus,
    StandbyStatus,
)
from cdp.store.errors import UnknownMachine, UnknownPosition
from journal import wire
from journal.errors import BadRequest, CdpError, NotProtected
from journal.position import Position
from journal.segment import Flags
from standby.spec import MachineSpec

if TYPE_CHECKING:
    from cdp.server.control import Hub, PeerState
    from cdp.server.proof_messages import ProofStatus
    from cdp.server.retention_messages import RetentionStatus
    from cdp.store import Store, Usage

Side = Literal["source", "standby"]
Prefill = Literal["open", "none", "filled"]

CONSUMER: Final = "standby"
"""The name of the standby's cursor."""
LAG_S_WARNING: Final = 15.0
"""A healthy machine is one to three seconds behind; this is well past any hiccup."""

_SPEC = msgspec.json.Decoder(MachineSpec)


class Ownership(Protocol):
    """What the takeovers of a machine say about it."""

    def side_of(self, machine: uuid.UUID) -> Side: ...
    def check_replica(self, machine: uuid.UUID) -> None: ...
    def newest(self, machine: uuid.UUID) -> dict[str, Any] | None: ...
    def standby_state(self, machine: uuid.UUID, reported: str | None) -> str: ...


class Machines:
    """``takeovers``: who owns the machine, and its newest takeover; ``domain_state``: the hypervisor's word, from a
    cache, because asking may take seconds; ``prefill`` and ``allowance``: see ``wire.MachineState``."""

    def __init__(
        self,
        store: Store,
        hub: Hub,
        *,
        takeovers: Ownership,
        domain_state: Callable[[uuid.UUID], str],
        prefill: Callable[[uuid.UUID], Prefill] = lambda _: "none",
        allowance: Callable[[uuid.UUID], int | None] = lambda _: None,
        retention: Callable[[uuid.UUID, Usage], RetentionStatus] | None = None,
        proof: Callable[[uuid.UUID], ProofStatus] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._hub = hub
        self._takeovers = takeovers
        self._domain_state = domain_state
        self._prefill = prefill
        self._allowance = allowance
        self._retention = retention
        self._proof = proof
        self._clock = clock
        self._disk_problems: dict[uuid.UUID, DisksChanged] = {}

    # --- specification and side ---------------------------------------------------------------------------------------
    def spec(self, machine: uuid.UUID) -> MachineSpec | None:
        raw = self._store.settings.get(f"spec/{machine}")
        return None if raw is None else _SPEC.decode(raw)

    def require_spec(self, machine: uuid.UUID) -> MachineSpec:
        spec = self.spec(machine)
        if spec is None:
            name = self._store.machine(machine).name
            raise NotProtected(
                f"The protection of {name!r} has not been started.", remedy=f"Run 'cdp protect {name}'.", machine=name
            )
        return spec

    def protect(self, machine: uuid.UUID, request: ProtectRequest) -> MachineSpec:
        """Record the specification; from now on the agent is told to begin. Raises ``BadRequest``."""
        held = self._store.machine(machine)
        names = {disk.name for disk in held.disks}
        if not held.disks:
            raise BadRequest(
                f"The agent of {held.name!r} has not reported its disks yet.",
                remedy="Join the machine and start its agent: 'cdp machines token NAME', then 'cdp join' there.",
            )
        if request.disks and set(request.disks) != names:
            raise BadRequest(
                f"The agent of {held.name!r} protects {', '.join(sorted(names))}, "
                f"not {', '.join(sorted(request.disks))}.",
                remedy="Change 'disks' in the agent's /etc/cdp/agent.toml and restart it, or name those disks.",
            )
        given = msgspec.structs.asdict(request)
        wanted = {
            key: value for key, value in given.items() if key not in {"disks", "start_standby"} and value is not None
        }
        try:
            spec = MachineSpec(machine=str(machine), name=held.name, disks=tuple(held.disks), **wanted)
        except ValueError as error:
            raise BadRequest(f"The specification is not valid: {error}.", remedy="Correct it.") from error
        self._store.settings.put(f"spec/{machine}", msgspec.json.encode(spec))
        return spec

    def forget(self, machine: uuid.UUID) -> None:
        self._disk_problems.pop(machine, None)
        for kind in ("spec", "retention", "limit", "verify", "compare", "reseed"):
            self._store.settings.delete(f"{kind}/{machine}")

    # --- disks --------------------------------------------------------------------------------------------------------
    def report_disks(self, machine: uuid.UUID, disks: list[wire.DiskInfo]) -> None:
        """The agent says what it protects. Growth and further disks are taken over, and the specification with them;
        anything else is kept as a problem until the agent reports the old disks again or the machine is seeded anew."""
        if not disks:
            return
        held = {disk.index: disk for disk in self._store.machine(machine).disks}
        told = {disk.index: disk for disk in disks}
        if len(told) != len(disks):
            raise BadRequest("Two disks have the same number.", remedy="The agent is broken: upgrade it.")
        spec = self.spec(machine)
        lost = [disk for index, disk in held.items() if index not in told]
        shrunk = [disk for index, disk in told.items() if index in held and disk.size_bytes < held[index].size_bytes]
        if spec is not None and (lost or shrunk):
            what = ", ".join(disk.name for disk in lost + shrunk)
            self._disk_problems[machine] = DisksChanged(
                f"Disks are missing or smaller than when protection began: {what}.",
                remedy="Bring them back, or remove the machine and protect it anew.",
            )
            return
        self._disk_problems.pop(machine, None)
        if told != held:
            self._store.update_disks(machine, disks)
            if spec is not None:
                changed = msgspec.structs.replace(spec, disks=tuple(disks))
                self._store.settings.put(f"spec/{machine}", msgspec.json.encode(changed))

    # --- state --------------------------------------------------------------------------------------------------------
    def check_replica(self, machine: uuid.UUID) -> None:
        """Raise ``ReplicaInUse`` or ``PrefillUnsettled`` unless a PE may read the history in order to write it to the
        standby's disks."""
        self._store.check_settled(machine)
        self._takeovers.check_replica(machine)

    def wire_state(self, machine: uuid.UUID) -> wire.MachineState:
        """What an agent or a PE is told. Raises ``NotProtected`` before 'cdp protect'."""
        held = self._store.machine(machine)
        spec = self.require_spec(machine)
        tip = self._store.live(machine)
        point = self._store.last_recovery_point(machine)
        return wire.MachineState(
            machine=str(machine),
            name=held.name,
            generation=tip.generation,
            tip=str(tip),
            recovery_point=None if point is None else str(point),
            fuzzy=self._fuzzy(machine, point),
            fenced=self._takeovers.side_of(machine) != "source",
            disks=held.disks,
            service_addresses=list(spec.service_addresses),
            prefill=self._prefill(machine),
            bytes_per_s_max=self._allowance(machine),
        )

    def status(self, machine: uuid.UUID) -> MachineStatus:
        """Everything at once, for the console, the CLI and the metrics."""
        held = self._store.machine(machine)
        spec = self.spec(machine)
        tip = self._store.live(machine)
        point = self._store.last_recovery_point(machine)
        agent = self._agent(machine)
        standby = self._standby(machine) if spec is not None and spec.standby is not None else None
        report = self._hub.state(machine, "agent").report
        fuzzy = spec is not None and self._fuzzy(machine, point)
        reason = report.fuzzy_reason if isinstance(report, wire.AgentReport) else ""
        side = self._takeovers.side_of(machine)
        usage = self._store.usage(machine)
        status = MachineStatus(
            machine=str(machine),
            name=held.name,
            protected=spec is not None,
            side=side,
            generation=tip.generation,
            disks=held.disks,
            stages=self._stages(machine, tip) if spec is not None else [],
            fuzzy=fuzzy,
            fuzzy_reason=reason if fuzzy else "",
            recovery_point=None if point is None else str(point),
            recovery_point_at_s=self._sealed_at_s(machine, point),
            journal=_journal(usage),
            retention=None if self._retention is None else self._retention(machine, usage),
            proof=None if self._proof is None else self._proof(machine),
            agent=agent,
            standby=standby,
            standby_state=self._standby_state(machine, standby),
            replica=self._replica(machine) if side == "standby" else None,
            spec=spec,
            takeover=self._takeovers.newest(machine),
            problems=[],
        )
        status.problems = self._problems(machine, status)
        return status

    def all(self) -> list[MachineStatus]:
        found = []
        for held in self._store.list_machines():
            try:
                found.append(self.status(held.uuid))
            except UnknownMachine:
                continue  # it was removed meanwhile
        return found

    def _fuzzy(self, machine: uuid.UUID, point: Position | None) -> bool:
        """Is there no recovery point at the tip? Inside a second (``CONTINUES``) the state before it counts."""
        header = self._store.live_header(machine)
        if header is None:
            return point is None
        return bool(header.flags & Flags.FUZZY) or point is None

    def _stages(self, machine: uuid.UUID, tip: Position) -> list[StageStatus]:
        now = self._clock()
        report = self._hub.state(machine, "agent").report
        told = report if isinstance(report, wire.AgentReport) else None
        cursor = self._store.cursor(machine, CONSUMER)
        stored_at_s = self._sealed_at_s(machine, tip)
        applied_at_s = self._sealed_at_s(machine, cursor)
        stages = [
            _stage("captured", None, told.captured_at_s if told else None, now, None),
            _stage("sealed", told.sealed if told else None, told.sealed_at_s if told else None, now, None),
            _stage("stored", str(tip), stored_at_s, now, told.backlog_bytes if told else None),
        ]
        if cursor is not None:
            stages.append(_stage("applied", str(cursor), applied_at_s, now, self._unapplied_bytes(machine, cursor)))
        return stages

    def _unapplied_bytes(self, machine: uuid.UUID, cursor: Position) -> int | None:
        try:
            return self._store.backlog_bytes(machine, cursor)[1]
        except UnknownPosition:
            return None

    def _sealed_at_s(self, machine: uuid.UUID, at: Position | None) -> float | None:
        if at is None or at.is_genesis:
            return None
        try:
            return self._store.header(machine, at).sealed_at_ns / 1e9
        except UnknownPosition:
            return None

    def _replica(self, machine: uuid.UUID) -> PeerStatus:
        """The agent inside the standby that has taken over."""
        state = self._hub.state(machine, "taken-over")
        return PeerStatus(**_peer(state, state.report.state if state.report else ""))

    def _agent(self, machine: uuid.UUID) -> AgentStatus:
        state = self._hub.state(machine, "agent")
        report = state.report if isinstance(state.report, wire.AgentReport) else None
        return AgentStatus(
            **_peer(state, "" if report is None else report.state),
            lost_events=report.lost_events if report else 0,
            resyncs=report.resyncs if report else {},
        )

    def _standby(self, machine: uuid.UUID) -> StandbyStatus:
        state = self._hub.state(machine, "pe")
        report = state.report if isinstance(state.report, wire.StandbyReport) else None
        return StandbyStatus(
            **_peer(state, "" if report is None else report.state),
            kexec_ready=report.kexec_ready if report else False,
            domain=self._domain_state(machine),
        )

    def _standby_state(self, machine: uuid.UUID, standby: StandbyStatus | None) -> str:
        if standby is None:
            return ""
        reported = standby.state if standby.connected and standby.state else None
        if reported is None and standby.domain == "running":
            reported = "pe-booting"
        return self._takeovers.standby_state(machine, reported)

    def _problems(self, machine: uuid.UUID, status: MachineStatus) -> list[str]:
        problems: list[str] = []
        if machine in self._disk_problems:
            problems.append(str(self._disk_problems[machine]))
        if not status.protected:
            return problems
        if status.side == "source":
            if not status.agent.connected:
                problems.append("The agent is not connected.")
            stored = next(stage for stage in status.stages if stage.stage == "stored")
            if status.agent.connected and stored.lag_s is not None and stored.lag_s > LAG_S_WARNING:
                problems.append(f"Replication is {stored.lag_s:.0f} s behind.")
            if status.fuzzy:
                problems.append(f"No recovery point can be offered now: {status.fuzzy_reason or 'seeding'}.")
            if status.standby is not None and not status.standby.connected:
                problems.append("The standby is not connected.")
        problems = _store_problems(self._store.refusal(machine), status.retention) + problems
        problems += _proof_problems(status.proof)
        for who, peer in (("agent", status.agent), ("standby", status.standby)):
            if peer is not None and peer.error is not None:
                problems.append(f"The {who} reports: {peer.error.get('sentence', 'an error')}")
        return problems


def _journal(usage: Usage) -> JournalStatus:
    return JournalStatus(
        segment_bytes=usage.segment_bytes,
        file_bytes=usage.file_bytes,
        oldest_s=None if usage.oldest_ns is None else usage.oldest_ns / 1e9,
        newest_s=None if usage.newest_ns is None else usage.newest_ns / 1e9,
    )


def _proof_problems(proof: ProofStatus | None) -> list[str]:
    problems = []
    if proof is not None and proof.damaged:
        problems.append(f"{proof.damaged} damages were found in what is stored: see 'cdp verify --last'.")
    if proof is not None and proof.compare_success is False:
        problems.append("The last comparison did not succeed: see 'cdp compare --last'.")
    return problems


def _store_problems(refusal: CdpError | None, retention: RetentionStatus | None) -> list[str]:
    """Why nothing is stored, and why less is folded than the policy wants."""
    problems = []
    if refusal is not None:
        problems.append(f"The store refuses what the agent sends: {refusal.sentence} {refusal.remedy}")
    if retention is None:
        return problems
    if retention.error is not None:
        problems.append(f"Retention fails: {retention.error.get('sentence', 'an error')}")
    if retention.held_by:
        problems.append(f"Retention is held back. {retention.held_by} {retention.remedy}")
    return problems


def _peer(state: PeerState, told: str) -> dict[str, Any]:
    report = state.report
    return {
        "connected": state.connected,
        "last_heard_s": state.last_heard_s or None,
        "state": told,
        "version": state.hello.version if state.hello else "",
        "progress": report.progress if report else None,
        "error": report.error if report else None,
        "cpu_s": report.cpu_s if report else 0.0,
        "resident_bytes": report.resident_bytes if report else 0,
    }


def _stage(
    stage: Literal["captured", "sealed", "stored", "applied"],
    position: str | None,
    at_s: float | None,
    now: float,
    backlog_bytes: int | None,
) -> StageStatus:
    """Clocks of source and server may differ a little: a lag is never negative."""
    lag_s = None if at_s is None else max(0.0, now - at_s)
    return StageStatus(stage=stage, position=position, at_s=at_s, lag_s=lag_s, backlog_bytes=backlog_bytes)
