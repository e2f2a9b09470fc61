"""What the agent knows of itself at this moment: the source of reports and metrics.

One object, written by the components in the event loop, read by the control channel and the metrics page.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from cdp.agent.errors import DiskChanged, LimitExceeded
from cdp.agent.rate import Bucket
from journal.errors import CdpError
from journal.position import Position
from journal.wire import AgentReport, Progress


@dataclass(slots=True)
class Status:
    """Times are seconds since the epoch."""

    boot_id: str
    starting: bool = True
    fenced: bool = False
    taken_over: bool = False
    quiesced: bool = False
    online: bool = False
    """The server answered last time."""
    sealed: Position | None = None
    stored: Position | None = None
    sealed_at_s: float | None = None
    stored_at_s: float | None = None
    captured_at_s: float | None = None
    backlog_bytes: int = 0
    backlog_segments: int = 0
    raw_backlog_bytes: int = 0
    fuzzy: bool = True
    fuzzy_reason: str = "starting"
    copying: str | None = None
    """Kind of the round that is under way."""
    progress: Progress | None = None
    lost: dict[str, int] = field(default_factory=dict)
    resyncs: Counter[str] = field(default_factory=Counter)
    errors: dict[str, CdpError] = field(default_factory=dict)
    """Per component; an entry disappears when the component works again."""
    drainer_pid: int | None = None
    drainer_restarts: int = 0
    sending: Bucket = field(default_factory=lambda: Bucket(None))
    """The server's limit, and what is sent above it."""

    @property
    def state(self) -> str:
        """One of the words of ``wire.AgentReport``."""
        plain = "seeding" if self.copying == "seed" else "resyncing" if self.fuzzy else "following"
        for word, holds in (
            ("taken-over", self.taken_over),
            ("fenced", self.fenced),
            ("failed", any(not error.transient for error in self.errors.values())),
            ("quiesced", self.quiesced),
            ("starting", self.starting),
            ("offline-spooling", not self.online),
        ):
            if holds:
                return word
        return plain

    def failed(self, component: str, error: CdpError) -> None:
        self.errors[component] = error

    def works(self, component: str) -> None:
        self.errors.pop(component, None)

    def history(
        self, *, fuzzy: bool, reason: str, copying: str | None, progress: Progress | None, backlog: tuple[int, int]
    ) -> None:
        """What the pipeline says after each cut. ``backlog``: bytes and segments in the spool."""
        self.fuzzy, self.fuzzy_reason = fuzzy, reason
        self.copying, self.progress = copying, progress
        self.backlog_bytes, self.backlog_segments = backlog

    def disks_changed(self, changed: dict[int, str]) -> None:
        """``changed``: disk and what happened to it."""
        if not changed:
            self.works("disks")
        for index, what in changed.items():
            self.failed(
                "disks",
                DiskChanged(
                    f"Disk {index} was {what}.",
                    remedy="There are no recovery points until it is as it was. If it has grown, restart the agent.",
                    disk=index,
                ),
            )

    def report(self) -> AgentReport:
        cpu_s, resident_bytes = usage(self.drainer_pid)
        self._look_at_limit()
        error: dict[str, Any] | None = next((error.as_dict() for error in self.errors.values()), None)
        return AgentReport(
            state=self.state,
            sealed=None if self.sealed is None else str(self.sealed),
            sealed_at_s=self.sealed_at_s,
            captured_at_s=self.captured_at_s,
            backlog_bytes=self.backlog_bytes,
            backlog_segments=self.backlog_segments,
            fuzzy=self.fuzzy,
            fuzzy_reason=self.fuzzy_reason if self.fuzzy else "",
            lost_events=sum(self.lost.values()),
            resyncs=dict(self.resyncs),
            progress=self.progress,
            cpu_s=cpu_s,
            resident_bytes=resident_bytes,
            boot_id=self.boot_id,
            error=error,
            borrowed_bytes=self.sending.borrowed_bytes,
        )

    def _look_at_limit(self) -> None:
        if not self.sending.exceeded:
            self.works("limit")
            return
        self.failed(
            "limit",
            LimitExceeded(
                f"The journal does not fit into {(self.sending.bytes_per_s or 0) / 1e6:.3g} MB/s and is sent faster "
                "than allowed for now, so that no writes are lost.",
                remedy="Raise the limit ('cdp limit set'), or give the agent a larger spool.",
            ),
        )


def usage(drainer_pid: int | None) -> tuple[float, int]:
    """CPU seconds and resident bytes of the agent's processes together."""
    cpu_s, resident = time.process_time(), 0
    for pid in ("self", drainer_pid):
        if pid is None:
            continue
        try:
            with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:  # noqa: PTH123 (hot path)
                line = next(line for line in file if line.startswith("VmRSS:"))
            resident += int(line.split()[1]) << 10
            if pid != "self":
                with open(f"/proc/{pid}/schedstat", encoding="ascii") as file:  # noqa: PTH123
                    cpu_s += int(file.read().split()[0]) / 1e9
        except (OSError, StopIteration, ValueError):
            continue  # it has just ended, and is being restarted
    return cpu_s, resident
