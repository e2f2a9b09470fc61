"""What a takeover looked like to the client, from its log: a function of values."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from deploy.lab.client import Commit


@dataclass(frozen=True)
class Seen:
    """``last_before`` is the last commit that the source acknowledged, ``first_after`` the first by the standby."""

    last_before: Commit
    first_after: Commit

    @property
    def downtime_s(self) -> float:
        return self.first_after.acknowledged_s - self.last_before.acknowledged_s


@dataclass(frozen=True)
class Rows:
    """Acknowledged commits against the table's rows. ``loss_s`` is the time from the last acknowledged commit that
    survived to the source's end, 0 if none is missing; ``doubled`` (a number twice) and ``stray`` (a number that the
    client never sent) must be empty."""

    acked: int
    missing: tuple[int, ...]
    doubled: tuple[int, ...]
    stray: tuple[int, ...]
    loss_s: float


def seen(commits: Sequence[Commit]) -> Seen | None:
    """The first change of the answering server; None while there was none."""
    for before, after in itertools.pairwise(commits):
        if before.server != after.server:
            return Seen(before, after)
    return None


def acknowledged_by_successor(commits: Sequence[Commit]) -> int:
    """How many commits the last server acknowledged, if there were two."""
    if not commits or commits[0].server == commits[-1].server:
        return 0
    return sum(commit.server == commits[-1].server for commit in commits)


def compare(commits: Sequence[Commit], rows: Sequence[int], until_s: float) -> Rows:
    """``rows`` as the table has them, ``until_s`` when the source ended."""
    held = set(rows)
    missing = tuple(commit.number for commit in commits if commit.number not in held)
    highest = max((commit.number for commit in commits), default=0)
    loss_s = 0.0
    if missing:
        before = [commit for commit in commits if commit.acknowledged_s <= until_s]
        kept = [commit.acknowledged_s for commit in before if commit.number in held]
        start_s = before[0].started_s if before else until_s
        loss_s = max(0.0, until_s - max(kept, default=start_s))
    return Rows(
        acked=len(commits),
        missing=missing,
        doubled=tuple(sorted({row for row in held if rows.count(row) > 1})) if len(held) != len(rows) else (),
        # One attempt may be under way when the log is read.
        stray=tuple(sorted(row for row in held if not 1 <= row <= highest + 1)),
        loss_s=loss_s,
    )
