"""The agent's metrics page, in Prometheus text format. Names and units are part of the interface; see
docs/operations.md."""

from __future__ import annotations

import time
from collections.abc import Iterator

from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cdp.agent.config import MetricsConfig
from cdp.agent.status import Status, usage


class AgentCollector(Collector):
    """Reads ``Status`` when it is asked."""

    def __init__(self, status: Status, machine: str) -> None:
        self._status = status
        self._machine = machine

    def collect(self) -> Iterator[Metric]:
        status, now = self._status, time.time()
        lag = GaugeMetricFamily(
            "cdp_replication_lag_seconds", "Age of the newest state at a stage.", labels=["machine", "stage"]
        )
        for stage, at_s in (
            ("captured", status.captured_at_s),
            ("sealed", status.sealed_at_s),
            ("stored", status.stored_at_s),
        ):
            if at_s is not None:
                lag.add_metric([self._machine, stage], max(0.0, now - at_s))
        yield lag
        for name, help_text, value in (
            ("cdp_last_sealed_timestamp_seconds", "When the newest segment was sealed.", status.sealed_at_s),
            ("cdp_last_stored_timestamp_seconds", "When the newest stored segment was sealed.", status.stored_at_s),
            ("cdp_backlog_bytes", "Sealed but not acknowledged.", float(status.backlog_bytes)),
            ("cdp_raw_backlog_bytes", "Captured but not sealed.", float(status.raw_backlog_bytes)),
            ("cdp_fuzzy", "1 while no recovery point can be made.", float(status.fuzzy)),
            ("cdp_agent_fenced", "1 while this machine may not serve.", float(status.fenced)),
            ("cdp_agent_online", "1 while the server answers.", float(status.online)),
        ):
            if value is not None:
                yield _gauge(name, help_text, self._machine, value)
        progress = status.progress
        if progress is not None:
            left = float(max(0, progress.total_bytes - progress.done_bytes))
            yield _gauge("cdp_copy_remaining_bytes", "Of a seed or resync.", self._machine, left)
            if progress.eta_s is not None:
                yield _gauge(
                    "cdp_backlog_eta_seconds", "Until a seed or resync is done.", self._machine, progress.eta_s
                )
        lost = CounterMetricFamily(
            "cdp_capture_lost_events", "Writes that could not be recorded.", labels=["machine", "cause"]
        )
        for cause, count in status.lost.items():
            lost.add_metric([self._machine, cause], count)
        yield lost
        resyncs = CounterMetricFamily(
            "cdp_resync", "Seeds, resyncs and comparisons begun.", labels=["machine", "reason"]
        )
        for reason, count in status.resyncs.items():
            resyncs.add_metric([self._machine, reason], count)
        yield resyncs
        cpu_s, resident = usage(status.drainer_pid)
        yield _gauge("cdp_agent_resident_memory_bytes", "Of all the agent's processes.", self._machine, resident)
        spent = CounterMetricFamily("cdp_agent_cpu_seconds", "Of all the agent's processes.", labels=["machine"])
        spent.add_metric([self._machine], cpu_s)
        yield spent


def _gauge(name: str, help_text: str, machine: str, value: float) -> GaugeMetricFamily:
    gauge = GaugeMetricFamily(name, help_text, labels=["machine"])
    gauge.add_metric([machine], value)
    return gauge


async def serve(config: MetricsConfig, status: Status, machine: str) -> web.AppRunner | None:
    """Serve ``/metrics``; the caller cleans the runner up. None if it is switched off."""
    if config.port == 0:
        return None
    registry = CollectorRegistry()
    registry.register(AgentCollector(status, machine))

    async def page(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), headers={"Content-Type": "text/plain; version=0.0.4"})

    app = web.Application()
    app.router.add_get("/metrics", page)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, config.host, config.port).start()
    return runner
