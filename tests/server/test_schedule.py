"""Bandwidth rules at moments of the calendar, and the total divided."""

from __future__ import annotations

import datetime
import math
from zoneinfo import ZoneInfo

import hypothesis.strategies as st
import pytest
from hypothesis import given

from cdp.server.limit_messages import LimitRule
from cdp.server.schedule import check_rule, parse_rate, parse_window, rate_at, shares

BERLIN = ZoneInfo("Europe/Berlin")
MB = 1_000_000


def at(text: str, zone: datetime.tzinfo = BERLIN, fold: int = 0) -> float:
    return datetime.datetime.fromisoformat(text).replace(tzinfo=zone, fold=fold).timestamp()


def rule(rate: int, during: str = "", zone: str = "Europe/Berlin") -> LimitRule:
    return LimitRule(bytes_per_s=rate, during=during, time_zone=zone)


def test_rates() -> None:
    assert parse_rate("50MB/s") == 50 * MB
    assert parse_rate("400 Mbit/s") == 50 * MB
    assert parse_rate("1.5GB/s") == 1500 * MB
    assert parse_rate("64kB/s") == 64_000
    for wrong in ("50", "50MB", "-1MB/s", "63kB/s", "0MB/s", "2000GB/s", "1e3MB/s", "50mb/s"):
        with pytest.raises(ValueError, match="/s"):
            parse_rate(wrong)


def test_windows() -> None:
    assert parse_window("Mon-Fri  08:00-18:00").days == {0, 1, 2, 3, 4}
    assert parse_window("sat-mon,wed 00:00-24:00").days == {5, 6, 0, 2}
    assert parse_window("22:00-06:00").days == set(range(7))
    for wrong in ("", "mon", "8:00-18:00", "mon 08:60-09:00", "mon 24:00-06:00", "mon 08:00-24:01", "mo 08:00-09:00"):
        with pytest.raises(ValueError, match=r"\w"):
            parse_window(wrong)
    with pytest.raises(ValueError, match="time zone"):
        check_rule(rule(MB, "mon 08:00-09:00", "Europe/Atlantis"))
    with pytest.raises(ValueError, match="time zone"):
        check_rule(rule(MB, "mon 08:00-09:00", "../../etc/passwd"))


def test_the_rule_with_a_window_goes_before_the_one_without_and_the_lowest_counts() -> None:
    rules = [rule(10 * MB), rule(50 * MB, "mon-fri 18:00-08:00"), rule(2 * MB, "mon-fri 08:00-18:00")]
    assert rate_at([], 0) is None
    assert rate_at(rules, at("2026-11-24 07:59:59")) == 50 * MB
    assert rate_at(rules, at("2026-11-24 08:00")) == 2 * MB
    assert rate_at(rules, at("2026-11-24 17:59:59")) == 2 * MB
    assert rate_at(rules, at("2026-11-24 18:00")) == 50 * MB
    assert rate_at(rules, at("2026-11-28 07:59")) == 50 * MB, "Friday's night goes on into Saturday"
    assert rate_at(rules, at("2026-11-28 08:00")) == 10 * MB
    assert rate_at(rules, at("2026-11-30 07:59")) == 10 * MB, "Sunday has no night"
    both = [*rules, rule(MB, "tue 12:00-13:00")]
    assert rate_at(both, at("2026-11-24 12:30")) == MB
    assert rate_at(rules[1:], at("2026-11-28 12:00")) is None


def test_a_window_is_a_matter_of_the_clock_on_the_wall() -> None:
    """Summer time begins on 29 March 2026 (02:00 is 03:00) and ends on 25 October (03:00 is 02:00)."""
    rules = [rule(MB, "01:00-04:00")]

    def seconds(day: str) -> int:
        start = int(at(f"{day} 00:00"))
        return sum(rate_at(rules, moment) is not None for moment in range(start, start + 6 * 3600, 60)) * 60

    assert seconds("2026-03-28") == 3 * 3600
    assert seconds("2026-03-29") == 2 * 3600
    assert seconds("2026-10-25") == 4 * 3600
    skipped = [rule(MB, "02:00-03:00")]
    start = int(at("2026-03-29 00:00"))
    assert not any(rate_at(skipped, moment) for moment in range(start, start + 6 * 3600, 60))
    twice = at("2026-10-25 02:30"), at("2026-10-25 02:30", fold=1)
    assert twice[1] - twice[0] == 3600
    assert all(rate_at(skipped, moment) for moment in twice)
    # The same rule, in another zone, is another moment.
    assert rate_at([rule(MB, "01:00-04:00", "UTC")], at("2026-07-01 03:30")) == MB
    assert rate_at(rules, at("2026-07-01 04:30")) is None


@given(
    st.integers(1, 10**9),
    st.dictionaries(st.integers(0, 50), st.one_of(st.floats(0, 1e9), st.just(math.inf)), min_size=1),
)
def test_the_total_is_divided_fairly_and_whole(total: int, wants: dict[int, float]) -> None:
    given_ = shares(total, wants)
    assert total - len(wants) <= sum(given_.values()) <= total
    for who, want in wants.items():
        assert given_[who] >= min(want, total / len(wants)) - 1
        for other, other_want in wants.items():
            assert other_want > want or given_[who] >= given_[other] - 1


def test_a_quiet_machine_keeps_nobody_waiting() -> None:
    assert shares(10 * MB, {"busy": math.inf, "quiet": 64_000}) == {"quiet": 64_000, "busy": 10 * MB - 64_000}
    assert shares(9 * MB, {"a": math.inf, "b": math.inf, "c": MB}) == {"a": 4 * MB, "b": 4 * MB, "c": MB}
    assert shares(9 * MB, {"a": MB, "b": 2 * MB, "c": 0}) == {"a": 3 * MB, "b": 4 * MB, "c": 2 * MB}
    assert shares(MB, {}) == {}
