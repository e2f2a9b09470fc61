"""Retention in the operator's API: paths and bodies. Shared with ``cdp``, like ``messages``."""

from __future__ import annotations

from typing import Any, Final, Literal

from journal.wire import Struct

RETENTION: Final = "/v1/operator/machines/{name}/retention"
"""GET -> RetentionStatus; PUT RetentionPolicy -> RetentionStatus; DELETE -> RetentionStatus: the server's default."""

KEEP_S_MIN: Final = 1.0
KEEP_S_MAX: Final = 100 * 365 * 86400.0


class RetentionPolicy(Struct):
    """How much of a machine's journal is kept before it is folded into the base image; None: no such limit.
    ``past_standby``: also what the standby has not applied yet; it is compared anew then."""

    keep_s: float | None = 86400.0
    max_bytes: int | None = None
    past_standby: bool = False

    def __post_init__(self) -> None:
        if self.keep_s is not None and not KEEP_S_MIN <= self.keep_s <= KEEP_S_MAX:
            raise ValueError("keep_s must lie between a second and a hundred years")
        if self.max_bytes is not None and self.max_bytes <= 0:
            raise ValueError("max_bytes must be positive")


class RetentionStatus(Struct):
    """``holds_s``: from the oldest recovery point to the newest. ``bytes_per_s``: today's rate; ``will_hold_s``: what
    the journal comes to hold at that rate, and ``limited_by`` what. ``held_by``: why less is folded than the policy
    wants, a sentence, "" if nothing is in the way. The last ones are sums since the server's start."""

    policy: RetentionPolicy
    is_default: bool
    holds_s: float | None = None
    bytes_per_s: float | None = None
    will_hold_s: float | None = None
    limited_by: Literal["time", "bytes", "disk", ""] = ""
    folding: bool = False
    folded_at_s: float | None = None
    held_by: str = ""
    remedy: str = ""
    error: dict[str, Any] | None = None
    store_free_bytes: int = 0
    folded_segments: int = 0
    freed_bytes: int = 0
    fold_s: float = 0.0
