"""How hard retention works, as a function of how far the journal is past its limits."""

from __future__ import annotations

import pytest

from cdp.server.retention_messages import RetentionPolicy
from cdp.server.upkeep import BEHIND, SLACK_SHARE, Limits, exceeded
from cdp.store import Usage

DAY_S = 86400.0
GIB = 1 << 30
NOW_S = 10 * DAY_S


def usage(*, age_s: float = 0.0, file_bytes: int = 0) -> Usage:
    oldest_ns = int((NOW_S - age_s) * 1e9)
    return Usage(segments=1, segment_bytes=0, file_bytes=file_bytes, oldest_ns=oldest_ns, newest_ns=int(NOW_S * 1e9))


def limits(policy: RetentionPolicy, now: Usage) -> Limits:
    found = exceeded(policy, now, NOW_S)
    assert found is not None
    return found


def test_a_journal_within_its_limits_is_left_alone() -> None:
    policy = RetentionPolicy(keep_s=DAY_S, max_bytes=GIB)
    assert exceeded(policy, usage(age_s=DAY_S * (1 + 1 / SLACK_SHARE) - 1000, file_bytes=GIB), NOW_S) is None
    assert exceeded(RetentionPolicy(keep_s=None), usage(age_s=9 * DAY_S, file_bytes=9 * GIB), NOW_S) is None


@pytest.mark.parametrize(("share", "pause"), [(1.0001, 1.0), (1 + (BEHIND - 1) / 2, 0.5), (BEHIND, 0.0), (9.0, 0.0)])
def test_pauses_shrink_with_what_is_past_the_limit(share: float, pause: float) -> None:
    """Without that a journal which grows faster than half of what folding can do stays at the end of its rope."""
    policy = RetentionPolicy(keep_s=None, max_bytes=GIB)
    found = limits(policy, usage(file_bytes=int(share * GIB)))
    assert (found.keep_ns, found.keep_bytes) == (None, GIB)
    assert found.wait_share == pytest.approx(pause, abs=0.01)


def test_the_limit_that_is_further_behind_decides() -> None:
    policy = RetentionPolicy(keep_s=DAY_S, max_bytes=GIB)
    found = limits(policy, usage(age_s=2 * DAY_S, file_bytes=GIB + 1))
    assert found == Limits(keep_ns=int(DAY_S * 1e9), keep_bytes=GIB, wait_share=0.0)
