"""``/metrics`` of the server: names and units as the documentation promises them.

Gauges are computed at each scrape from the same status that people see; only what happens inside the server is counted.
Anyone on the server's own host may read them; from elsewhere it takes an operator's credential.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cdp.server.messages import MachineStatus
from cdp.server.proof_messages import ProofStatus
from cdp.server.retention_messages import RetentionStatus

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Counters:
    """What the server itself does. Called from the event loop."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._bytes = Counter(
            "cdp_ingest_bytes", "Encoded bytes of stored segments.", ["machine"], registry=self.registry
        )
        self._segments = Counter("cdp_ingest_segments", "Stored segments.", ["machine"], registry=self.registry)
        self._duplicates = Counter(
            "cdp_ingest_duplicates", "Segments that were stored already.", ["machine"], registry=self.registry
        )
        self._deduplicated = Counter(
            "cdp_dedup_bytes", "Not sent, because the server had it.", ["machine"], registry=self.registry
        )
        self._seconds = Histogram(
            "cdp_ingest_store_seconds",
            "From the whole body received to the segment durable.",
            buckets=(0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10),
            registry=self.registry,
        )
        self.refused = Counter("cdp_refused", "Requests that were refused.", ["code"], registry=self.registry)

    def stored(self, machine: uuid.UUID, length: int, took_s: float, *, duplicate: bool) -> None:
        label = str(machine)
        if duplicate:
            self._duplicates.labels(label).inc()
        else:
            self._segments.labels(label).inc()
            self._bytes.labels(label).inc(length)
        self._seconds.observe(took_s)

    def deduplicated(self, machine: uuid.UUID, length: int) -> None:
        self._deduplicated.labels(str(machine)).inc(length)

    def forget(self, machine: uuid.UUID) -> None:
        for metric in (self._bytes, self._segments, self._duplicates, self._deduplicated):
            _drop(metric, str(machine))


def _drop(metric: Counter, label: str) -> None:
    try:
        metric.remove(label)
    except KeyError:
        return


class StatusCollector(Collector):
    """The gauges of every machine, from ``statuses()``."""

    def __init__(
        self, statuses: Callable[[], list[MachineStatus]], phases: Callable[[dict[str, Any]], dict[str, float]]
    ):
        self._statuses = statuses
        self._phases = phases

    def collect(self) -> Iterator[Metric]:
        families = _Families()
        for status in self._statuses():
            families.add(status, self._phases)
        yield from families.all()


def render(*registries: CollectorRegistry) -> bytes:
    return b"".join(generate_latest(registry) for registry in registries)


class _Families:
    def __init__(self) -> None:
        self._held: dict[str, Metric] = {}

    def all(self) -> list[Metric]:
        return list(self._held.values())

    def add(self, status: MachineStatus, phases: Callable[[dict[str, Any]], dict[str, float]]) -> None:
        name = status.name
        for stage in status.stages:
            self._gauge(
                "cdp_replication_lag_seconds",
                "Age of the newest that passed the stage.",
                stage.lag_s,
                machine=name,
                stage=stage.stage,
            )
            self._gauge(
                "cdp_backlog_bytes",
                "Bytes that have yet to pass the stage.",
                stage.backlog_bytes,
                machine=name,
                stage=stage.stage,
            )
            if stage.stage != "captured":
                self._gauge(
                    f"cdp_last_{stage.stage}_timestamp_seconds",
                    f"Seal time of the last {stage.stage} segment.",
                    stage.at_s,
                    machine=name,
                )
        for peer in (status.agent, status.standby):
            if peer is not None and peer.progress is not None:
                self._gauge(
                    "cdp_backlog_eta_seconds",
                    "Until the copy in progress is complete.",
                    peer.progress.eta_s,
                    machine=name,
                    what=peer.progress.what,
                )
        self._gauge("cdp_fuzzy", "1 while no recovery point can be offered.", float(status.fuzzy), machine=name)
        self._gauge("cdp_generation", "The live generation.", float(status.generation), machine=name)
        self._gauge(
            "cdp_recovery_point_timestamp_seconds",
            "The newest recovery point.",
            status.recovery_point_at_s,
            machine=name,
        )
        self._journal(status)
        self._agent(status)
        if status.standby is not None:
            standby = status.standby
            ready = standby.connected and standby.state == "ready" and standby.kexec_ready
            self._gauge(
                "cdp_standby_ready", "1 if a takeover would find the standby ready.", float(ready), machine=name
            )
            self._gauge(
                "cdp_standby_connected",
                "1 while the standby's PE is connected.",
                float(standby.connected),
                machine=name,
            )
        if status.takeover is not None:
            for phase, seconds in phases(status.takeover).items():
                self._gauge(
                    "cdp_takeover_phase_seconds",
                    "Duration of each phase of the newest takeover.",
                    seconds,
                    machine=name,
                    phase=phase,
                )

    def _journal(self, status: MachineStatus) -> None:
        name, journal = status.name, status.journal
        self._gauge("cdp_journal_bytes", "Stored segments of the machine.", float(journal.segment_bytes), machine=name)
        self._gauge(
            "cdp_journal_file_bytes", "Disk space of its segment files.", float(journal.file_bytes), machine=name
        )
        self._gauge(
            "cdp_journal_oldest_timestamp_seconds", "The oldest stored segment.", journal.oldest_s, machine=name
        )
        if status.proof is not None:
            self._proof(name, status.proof)
        if status.retention is not None:
            self._retention(name, status.retention)

    def _proof(self, name: str, proof: ProofStatus) -> None:
        for what, at_s, success in (
            ("verify", proof.verified_s, proof.verify_success),
            ("compare", proof.compared_s, proof.compare_success),
        ):
            told = None if success is None else float(success)
            self._gauge(f"cdp_{what}_last_success", f"1 if the last {what} found nothing wrong.", told, machine=name)
            self._gauge(f"cdp_{what}_last_timestamp_seconds", f"When the last {what} ended.", at_s, machine=name)
        self._gauge("cdp_verify_damaged", "Damages that the last verify found.", float(proof.damaged), machine=name)

    def _retention(self, name: str, kept: RetentionStatus) -> None:
        for metric, text, value in (
            ("cdp_retention_folded_segments", "Segments folded into the base image.", kept.folded_segments),
            ("cdp_retention_freed_bytes", "Disk space of segment files that was given back.", kept.freed_bytes),
            ("cdp_retention_fold_seconds", "Time spent folding.", kept.fold_s),
        ):
            self._counter(metric, text, float(value), machine=name)
        held = float(bool(kept.held_by) or kept.error is not None)
        self._gauge("cdp_retention_held", "1 while less is folded than the policy wants.", held, machine=name)
        self._gauge(
            "cdp_journal_forecast_seconds",
            "What the journal will hold at today's rate.",
            kept.will_hold_s,
            machine=name,
        )
        if "cdp_store_free_bytes" not in self._held:
            self._gauge("cdp_store_free_bytes", "Free on the store's filesystem.", float(kept.store_free_bytes))

    def _agent(self, status: MachineStatus) -> None:
        name, agent = status.name, status.agent
        self._gauge("cdp_agent_connected", "1 while the agent is connected.", float(agent.connected), machine=name)
        self._counter(
            "cdp_capture_lost_events",
            "Writes that were not captured, and resynchronised.",
            float(agent.lost_events),
            machine=name,
        )
        for reason, count in agent.resyncs.items():
            self._counter("cdp_resync", "Resyncs by reason.", float(count), machine=name, reason=reason)
        self._counter("cdp_agent_cpu_seconds", "CPU time of the agent's processes.", agent.cpu_s, machine=name)
        self._gauge(
            "cdp_agent_resident_memory_bytes",
            "Resident memory of the agent's processes.",
            float(agent.resident_bytes),
            machine=name,
        )

    def _gauge(self, name: str, text: str, value: float | None, **labels: str) -> None:
        if value is not None:
            family = self._held.setdefault(name, GaugeMetricFamily(name, text, labels=list(labels)))
            family.add_sample(name, labels, float(value))

    def _counter(self, name: str, text: str, value: float, **labels: str) -> None:
        family = self._held.setdefault(name, CounterMetricFamily(name, text, labels=list(labels)))
        family.add_sample(f"{name}_total", labels, value)
