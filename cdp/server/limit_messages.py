"""The operator API of bandwidth limits."""

from __future__ import annotations

import msgspec

from journal.wire import Struct

LIMITS = "/v1/operator/limits"
"""GET -> LimitsAnswer."""
LIMIT = "/v1/operator/limits/{name}"
"""PUT LimitRule -> LimitsAnswer: adds the rule, in place of one with the same window. DELETE ?during=&time_zone=
(absent: all) -> LimitsAnswer. ``name``: a machine's, or TOTAL."""
TOTAL = "@total"
"""No machine can be called so."""
RULES_MAX = 32
"""Of one scope: more are not a schedule that anybody understands."""


class LimitRule(Struct):
    """See ``schedule.py``. ``during`` "": always; then the time zone means nothing."""

    bytes_per_s: int
    during: str = ""
    time_zone: str = "UTC"


class MachineLimit(Struct):
    """``own``: what its rules allow now; ``allowed``: that and its part of the total; None: no limit. ``sent``:
    measured over some seconds. ``borrowed_bytes``: sent above the limit, because otherwise writes had been lost."""

    name: str
    rules: list[LimitRule] = msgspec.field(default_factory=list)
    own_bytes_per_s: int | None = None
    allowed_bytes_per_s: int | None = None
    sent_bytes_per_s: int = 0
    borrowed_bytes: int = 0


class LimitsAnswer(Struct):
    total_rules: list[LimitRule]
    total_bytes_per_s: int | None
    machines: list[MachineLimit] = msgspec.field(default_factory=list)
