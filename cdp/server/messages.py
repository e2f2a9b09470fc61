"""The operator's API, ``/v1/operator/...``: paths and bodies.

``cdp`` and the server share this module; it imports nothing that only the server has.

{name} is a machine's name or UUID. Times are seconds since the Unix epoch, sizes bytes. Bodies are JSON; an error is
``{"code", "sentence", "remedy", "fields", "transient"}`` with the HTTP status of its kind.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from cdp.server.proof_messages import ProofStatus
from cdp.server.retention_messages import RetentionStatus
from journal.wire import DiskInfo, Progress, Struct
from standby.spec import Deadlines, MachineSpec, Probe, QuiesceMode, SourceDomain, StandbySpec

PREFIX = "/v1/operator"
VERSION = PREFIX + "/version"
"""GET -> VersionAnswer."""
MACHINES = PREFIX + "/machines"
"""GET -> list[MachineStatus]; POST NewMachine -> TokenAnswer."""
MACHINE = PREFIX + "/machines/{name}"
"""GET -> MachineStatus; DELETE: forgets the machine and its whole journal (?force=1 although it is protected)."""
TOKENS = PREFIX + "/machines/{name}/tokens"
"""POST -> TokenAnswer: another join token for the machine's agent."""
CREDENTIALS = PREFIX + "/machines/{name}/credentials"
"""DELETE -> Revoked: end the agent's and the standby's credentials at once."""
PROTECTION = PREFIX + "/machines/{name}/protection"
"""GET -> MachineSpec; PUT ProtectRequest -> MachineStatus."""
STANDBY = PREFIX + "/machines/{name}/standby"
"""POST StandbyAct -> MachineStatus: define, start, stop or remove the standby's domain."""
POINTS = PREFIX + "/machines/{name}/recovery-points"
"""GET ?from=&to= (seconds) &limit= -> PointsAnswer: the newest ``limit``, at most POINTS_MAX; for those before them
ask again up to the time of the first one."""
POINT = PREFIX + "/machines/{name}/recovery-point"
"""GET ?at= (seconds; absent: the newest) -> PointAnswer: the newest recovery point up to that millisecond's end; or
?bookmark=, the one that carries the name."""
BOOKMARKS = PREFIX + "/machines/{name}/bookmarks"
"""GET -> list[BookmarkInfo], the oldest recovery point first; POST BookmarkRequest -> BookmarkInfo."""
BOOKMARK = PREFIX + "/machines/{name}/bookmarks/{id}"
"""PATCH BookmarkHold -> BookmarkInfo; DELETE. {id} is the bookmark's name."""
MACHINE_TAKEOVERS = PREFIX + "/machines/{name}/takeovers"
"""GET -> list[dict], the newest first; POST TakeoverRequest -> dict, the record of the takeover that was started."""
TAKEOVER = PREFIX + "/takeovers/{id}"
"""GET ?after_version=&wait_s= -> dict: long-polls for a newer version of the record."""
RETRY = PREFIX + "/takeovers/{id}/retry"
"""POST -> dict: try again what has stalled."""
COMMIT = PREFIX + "/takeovers/{id}/commit"
"""POST -> dict: the source will not be needed any more."""
ROLLBACK = PREFIX + "/takeovers/{id}/rollback"
"""POST -> dict: back to the source."""
OPERATOR_TOKENS = PREFIX + "/tokens"
"""POST -> TokenAnswer: for another operator."""
AUDIT = PREFIX + "/audit"
"""GET ?limit= -> list[AuditLine], the newest first."""

POINTS_MAX = 10_000
AUDIT_MAX = 1000

Stage = Literal["captured", "sealed", "stored", "applied"]


class VersionAnswer(Struct):
    version: str
    url: str
    fingerprint: str


class NewMachine(Struct):
    name: str


class TokenAnswer(Struct):
    """``token`` is shown once. ``machine`` is None for an operator's token."""

    token: str
    machine: str | None
    url: str
    expires_at_s: float


class Revoked(Struct):
    credentials: int


class ProtectRequest(Struct):
    """The specification without what the server knows. ``disks``: names that the agent must report, all of them;
    empty: whatever it reports."""

    disks: tuple[str, ...] = ()
    service_addresses: tuple[str, ...] = ()
    probes: tuple[Probe, ...] = ()
    quiesce: QuiesceMode = "freeze"
    standby: StandbySpec | None = None
    source_domain: SourceDomain | None = None
    deadlines: Deadlines | None = None
    silence_s: float | None = None
    rollback_window_s: float | None = None
    automatic_rollback: bool | None = None
    start_standby: bool = True


class StandbyAct(Struct):
    act: Literal["define", "start", "stop", "remove"]


class TakeoverRequest(Struct):
    """``source_is_down``: the operator's word, in place of evidence, that the source does not run any more; ``force``:
    take the addresses although somebody still answers there."""

    mode: Literal["planned", "unplanned"]
    source_is_down: bool = False
    force: bool = False


class BookmarkHold(Struct):
    """``hold``: retention stops at the bookmark, or goes past it again."""

    hold: bool


class PointAnswer(Struct):
    machine: str
    name: str
    position: str
    sealed_at_s: float
    disks: list[DiskInfo]


class Interval(Struct):
    """No recovery point lies inside; None: it is open on that side."""

    start_s: float | None
    end_s: float | None


class PointBookmark(Struct):
    name: str
    position: str
    consistency: Literal["crash", "application"]


class PointsAnswer(Struct):
    """``points``: time, position, and the bytes that were stored since the one before; oldest first."""

    points: list[tuple[float, str, int]]
    fuzzy: list[Interval]
    bookmarks: list[PointBookmark]
    truncated: bool


class AuditLine(Struct):
    at_s: float
    actor: str
    action: str
    subject: str
    details: dict[str, str]


class StageStatus(Struct):
    """A watermark. ``lag_s``: how old the newest of what has passed this stage is; ``backlog_bytes``: what has passed
    the stage before, but not this one. None: not known, because nobody reports it."""

    stage: Stage
    position: str | None
    at_s: float | None
    lag_s: float | None
    backlog_bytes: int | None


class PeerStatus(Struct):
    connected: bool
    last_heard_s: float | None
    state: str
    version: str = ""
    progress: Progress | None = None
    error: dict[str, Any] | None = None
    cpu_s: float = 0.0
    resident_bytes: int = 0


class AgentStatus(PeerStatus):
    lost_events: int = 0
    resyncs: dict[str, int] = msgspec.field(default_factory=dict)


class StandbyStatus(PeerStatus):
    """``domain``: what the hypervisor says, "" if it was not asked or is out of reach."""

    kexec_ready: bool = False
    domain: str = ""


class JournalStatus(Struct):
    segment_bytes: int
    file_bytes: int
    oldest_s: float | None
    newest_s: float | None


class MachineStatus(Struct):
    """``side``: who is meant to own the service addresses and to push. ``standby_state``: the one word of the standby's
    state table, "" without a standby. ``replica``: the agent inside a standby that has taken over. ``problems``:
    sentences, worst first; empty when all is well."""

    machine: str
    name: str
    protected: bool
    side: Literal["source", "standby"]
    generation: int
    disks: list[DiskInfo]
    stages: list[StageStatus]
    fuzzy: bool
    fuzzy_reason: str
    recovery_point: str | None
    recovery_point_at_s: float | None
    journal: JournalStatus
    retention: RetentionStatus | None
    proof: ProofStatus | None
    agent: AgentStatus
    standby: StandbyStatus | None
    standby_state: str
    replica: PeerStatus | None
    spec: MachineSpec | None
    takeover: dict[str, Any] | None
    problems: list[str]


class OperatorFile(Struct):
    """What ``cdp`` keeps in ``operator.json``, mode 0600."""

    server: str
    ca_pem: str
    credential: str
    secret: str
