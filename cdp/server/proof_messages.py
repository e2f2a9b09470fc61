"""The operator's API for proof: verify, repair and compare. {name} is a machine's name or UUID."""

from __future__ import annotations

from typing import Literal

import msgspec

from journal.wire import Progress, Struct

PREFIX = "/v1/operator"
VERIFY = PREFIX + "/machines/{name}/verify"
"""GET -> VerifyAnswer; POST VerifyRequest -> VerifyAnswer: begins, or hurries what runs already."""
COMPARE = PREFIX + "/machines/{name}/compare"
"""GET -> CompareAnswer; POST CompareRequest -> CompareAnswer: begins, or tells of what runs already."""
RESEED = PREFIX + "/machines/{name}/reseed"
"""POST -> {}: the standby compares its disks with the store, then follows again."""
RANGES_MAX = 1000
"""Differing ranges that are kept and shown."""


class DamageLine(Struct):
    """Recovery points in ``[first_s, until_s)`` are not whole; None: from the oldest, up to now. ``costs``: there are
    any. ``lost_bytes``: what the newest image lacks; None: unknown."""

    kind: Literal["segment", "chain", "base", "index", "run"]
    sentence: str
    position: str | None
    first_s: float | None
    until_s: float | None
    costs: bool
    lost_bytes: int | None


class VerifyReport(Struct):
    """``damaged``: all damages but those of run files, which mend themselves; ``damages``: the first of them.
    ``repair``: what was ordered to mend them, "" if nothing was."""

    started_s: float
    ended_s: float
    complete: bool
    success: bool
    segments: int
    read_bytes: int
    index_rows: int
    run_files: int
    damaged: int
    damages: list[DamageLine]
    repair: str = ""
    error: str = ""


class VerifyRequest(Struct):
    repair: bool = False


class VerifyAnswer(Struct):
    running: Progress | None
    last: VerifyReport | None


class Differing(Struct):
    """``with_what``: whose disk differs from the store's image."""

    with_what: Literal["source", "standby"]
    disk: int
    offset: int
    length: int


class CompareReport(Struct):
    """``compared_bytes``: per side. ``unsettled_bytes``: parts of blocks that were written at that very moment, which
    nobody can compare; ``standby``: it took part. ``differing``: the first of them."""

    started_s: float
    ended_s: float
    success: bool
    position: str | None = None
    sealed_at_s: float | None = None
    standby: bool = False
    compared_bytes: int = 0
    unsettled_bytes: int = 0
    differing_bytes: int = 0
    differing: list[Differing] = msgspec.field(default_factory=list)
    error: str = ""
    remedy: str = ""


class CompareRequest(Struct):
    """``standby``: None: if the machine has one that is connected."""

    standby: bool | None = None


class CompareAnswer(Struct):
    """``phase``: what is being done, "" when nothing runs."""

    phase: str
    running: Progress | None
    last: CompareReport | None


class ProofStatus(Struct):
    """In short, for the status and the metrics. None: never done."""

    verified_s: float | None = None
    verify_success: bool | None = None
    damaged: int = 0
    compared_s: float | None = None
    compare_success: bool | None = None
