"""What crosses the network: paths, and the messages of the control channel.

Only the server listens. Data travels over plain HTTPS requests; control travels over one websocket per peer that the
peer (an agent or a PE) opens, in JSON frames:

    peer   -> server   Hello, then Report at least once a second
    server -> peer     Call(id, verb, args)
    peer   -> server   Result(id, ok) or Failure(id, error)

Every request but CA and JOIN carries the credential that joining gave, see ``authorization``.

A verb is idempotent: the takeover controller may repeat a call after it was restarted, and gets the same answer.
"""

from __future__ import annotations

import re
from typing import Any, Final, Literal

import msgspec

from journal.errors import CdpError

# --- paths; {machine} is a machine's UUID ---------------------------------------------------------------------------
CA = "/v1/ca"
"""GET, no credential: the server's CA certificate (PEM). The caller checks it against the join token's fingerprint."""
JOIN = "/v1/join"
"""POST JoinRequest -> JoinAnswer: trades a one-time token for a credential."""
MACHINE = "/v1/machines/{machine}"
"""GET -> MachineState."""
SEGMENT = "/v1/machines/{machine}/segments/{generation}/{seq}"
"""PUT (agent) the bytes of a segment -> StoredAnswer; GET (PE, operator) -> the same bytes, unchanged."""
FEED = "/v1/machines/{machine}/feed"
"""GET ?after=POSITION&until=recovery-point|tip&wait_s=N -> FeedAnswer: headers that follow, long-polling."""
HASHES = "/v1/machines/{machine}/hashes"
"""GET ?disk=&offset=&length=&chunk= -> concatenated 32-byte blake3 digests, one per chunk of the newest image;
a chunk that reads as zeros has the all-zero digest."""
IMAGE = "/v1/machines/{machine}/image"
"""GET ?at=POSITION&disk=&offset=&length= -> one segment (journal format, chained to nothing: ``previous`` is the
digest of POSITION) whose extents hold that range of the disk at that position; holes are left out."""
PREFILL = "/v1/machines/{machine}/prefill"
"""What the server has already of a machine that is new to it, before its first segment (agent). POST -> PrefillBegun:
begins, or begins anew. PUT ?key=&disk= (body: see ``journal/proof.py``) -> PrefillLaid: lays what is found below the
image. DELETE -> PrefillEnded: that was it; from now on the image at the genesis stays as it is."""
CURSOR = "/v1/machines/{machine}/cursors/{consumer}"
"""PUT (PE) CursorBody after its disk is durable at that position; GET (PE) -> CursorBody. ``position`` None, in both
directions: the disks hold no known state (nothing was acknowledged yet, or a takeover is going to write to them), so
that the standby has to seed by comparing."""
BOOKMARKS = "/v1/machines/{machine}/bookmarks"
"""POST BookmarkRequest -> BookmarkInfo (agent): a bookmark of now, asked for on the machine itself."""
COMPARISON = "/v1/machines/{machine}/comparisons/{comparison}"
"""PUT (agent) what its disks hold at a position (``journal/comparison.py``) -> {}; GET (PE) -> the same bytes."""
LOST = "/v1/machines/{machine}/lost"
"""POST LostBody (agent): the server is older than what it has acknowledged -> {}."""
CONTROL = "/v1/control"
"""GET, websocket."""


def authorization(credential: str, secret: str) -> dict[str, str]:
    """The headers that prove who is asking: ``Authorization: Bearer CREDENTIAL.SECRET``."""
    return {"Authorization": f"Bearer {credential}.{secret}"}


GENESIS_IMAGE_SEQ = 1
"""``seq`` of the segments that IMAGE answers with; they are not part of any chain."""


class Struct(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Base of all messages: unknown fields are errors."""


# --- joining ----------------------------------------------------------------------------------------------------------
class DiskInfo(Struct):
    """One protected disk. ``index`` is its number in extent tables; sizes in bytes."""

    index: int
    name: str
    size_bytes: int
    sector_bytes: int = 512
    serial: str = ""


class JoinRequest(Struct):
    token: str
    role: Literal["agent", "pe", "operator"]
    name: str


class JoinAnswer(Struct):
    """``secret`` is shown once; the server keeps only its hash. ``machine`` is None for operators."""

    credential: str
    secret: str
    machine: str | None


# --- data -------------------------------------------------------------------------------------------------------------
class MachineState(Struct):
    """Where a writer has to continue. ``tip`` is the last stored position of the live generation.

    ``service_addresses``: what the live generation's side may hold, with prefixes; a fenced agent gives them up.
    ``prefill``: what the image at the first genesis is. none: zeros, for ever; filled: something was laid there;
    open: it is the agent's turn to ask for that, and to end it (``PREFILL``), before it begins.
    ``bytes_per_s_max``: see ``StoredAnswer``."""

    machine: str
    name: str
    generation: int
    tip: str
    recovery_point: str | None
    fuzzy: bool
    fenced: bool
    disks: list[DiskInfo]
    service_addresses: list[str] = []
    prefill: Literal["open", "none", "filled"] = "none"
    bytes_per_s_max: int | None = None


class StoredAnswer(Struct):
    """``bytes_per_s_max``: what the agent may send from now on; None: as much as it likes."""

    position: str
    duplicate: bool
    bytes_per_s_max: int | None = None


class PrefillBegun(Struct):
    """``key``: hex of the 32 bytes that go into each proof."""

    key: str


class PrefillLaid(Struct):
    chunks: int


class PrefillEnded(Struct):
    prefill: Literal["none", "filled"]


class CursorBody(Struct):
    position: str | None


class LostBody(Struct):
    """``acknowledged``: the last position that the agent knows to have been stored."""

    acknowledged: str


class FeedEntry(Struct):
    position: str
    segment_bytes: int
    sealed_at_ns: int
    recovery_point: bool


class FeedAnswer(Struct):
    """``entries`` follow ``after`` without a gap. ``restart`` is set when ``after`` is not in the live history (the
    standby must seed again), ``tip`` is the newest position that the server holds."""

    entries: list[FeedEntry]
    tip: str
    restart: bool = False


# --- bookmarks --------------------------------------------------------------------------------------------------------
BOOKMARK_WAIT_S_MAX = 3600.0
BOOKMARK_NOTE_CHARS_MAX = 1000


class BookmarkRequest(Struct):
    """``application``: the machine is held still at that point. ``hold``: retention stops there. ``at_s``: a recovery
    point of the past, the newest up to that millisecond's end. ``wait_s``: for preparing, freezing and storing."""

    name: str
    note: str = ""
    application: bool = False
    hold: bool = False
    at_s: float | None = None
    wait_s: float = 110.0


class BookmarkInfo(Struct):
    """``hooks``: what held the machine still, and what that said. ``expired_at_s``: when retention has folded it."""

    name: str
    position: str
    sealed_at_s: float
    created_at_s: float
    note: str
    consistency: Literal["crash", "application"]
    hold: bool
    hooks: str
    expired_at_s: float | None = None


# --- control ----------------------------------------------------------------------------------------------------------
class Progress(Struct):
    """Long work. ``eta_s`` is None while it cannot be told."""

    what: str
    done_bytes: int
    total_bytes: int
    bytes_per_s: float = 0.0
    eta_s: float | None = None


class AgentReport(Struct, tag="agent-report"):
    """``state``: starting, seeding, following, resyncing, offline-spooling, quiesced, fenced, taken-over, failed.
    Times are seconds since the Unix epoch, sizes bytes."""

    state: str
    sealed: str | None
    sealed_at_s: float | None
    captured_at_s: float | None
    backlog_bytes: int
    backlog_segments: int
    fuzzy: bool
    fuzzy_reason: str = ""
    lost_events: int = 0
    resyncs: dict[str, int] = {}
    progress: Progress | None = None
    cpu_s: float = 0.0
    resident_bytes: int = 0
    boot_id: str = ""
    error: dict[str, Any] | None = None
    borrowed_bytes: int = 0


class StandbyReport(Struct, tag="standby-report"):
    """``state``: pe-booting, seeding, following, ready, taking-over, failed. ``kexec_ready``: the replicated system's
    kernel is loaded and was read at the applied recovery point's /boot."""

    state: str
    applied: str | None
    applied_at_s: float | None
    backlog_bytes: int = 0
    kexec_ready: bool = False
    progress: Progress | None = None
    cpu_s: float = 0.0
    resident_bytes: int = 0
    error: dict[str, Any] | None = None


class Hello(Struct, tag="hello"):
    """First frame of a peer. ``role`` says which verbs it serves; ``taken_over`` is the id of the takeover that made
    this machine, when the replicated agent finds itself on the target."""

    role: Literal["agent", "pe"]
    version: str
    boot_id: str
    disks: list[DiskInfo] = []
    taken_over: str | None = None


class Result(Struct, tag="result"):
    id: int
    ok: dict[str, Any]


class Failure(Struct, tag="failure"):
    id: int
    error: dict[str, Any]


class Call(Struct, tag="call"):
    id: int
    verb: str
    args: dict[str, Any]
    deadline_s: float


FromPeer = Hello | AgentReport | StandbyReport | Result | Failure
"""Decode with ``msgspec.json.Decoder(FromPeer)``."""


_CODE: Final = re.compile(r"[a-z]+(-[a-z]+){0,9}")


class RemoteError(CdpError):
    """An error that the other side reported and that has no class of its own here; it keeps its code."""

    code = "remote-error"


def raise_remote(body: dict[str, Any]) -> None:
    """Turn the JSON body of an error answer back into the typed error that it was, and raise it."""
    known: dict[str, type[CdpError]] = {}
    todo: list[type[CdpError]] = [CdpError]
    while todo:
        kind = todo.pop()
        known[kind.code] = kind
        todo.extend(kind.__subclasses__())
    kind = known.get(str(body.get("code")), RemoteError)
    fields = body.get("fields") or {}
    error = kind(str(body.get("sentence", "The other side failed.")), remedy=str(body.get("remedy", "")), **fields)
    if _CODE.fullmatch(str(body.get("code"))):
        error.code = str(body["code"])
    error.transient = bool(body.get("transient", kind.transient))
    raise error
