"""Bandwidth rules: what they say, and which one holds at a moment. Pure functions of values.

A rule is a rate and, maybe, a window of the week in a time zone:

    50MB/s                                   always
    10MB/s  mon-fri 08:00-18:00  Europe/Berlin
    2MB/s   sat,sun 22:00-06:00              from each of these days' evening into the next morning

Of the rules that hold at a moment, those with a window go before the one without; of several, the lowest rate counts.
A window is a matter of the clock on the wall: on the day on which summer time begins, 01:00-04:00 lasts two hours.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cdp.server.limit_messages import LimitRule

DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
BYTES_PER_S_MIN: Final = 64_000
"""Below this a machine's heartbeats alone would lag."""
BYTES_PER_S_MAX: Final = 10**12
_DAY_MINUTES: Final = 24 * 60
_RATE: Final = re.compile(r"(\d+(?:\.\d+)?) *(k|M|G)?(B/s|bit/s)")
_WINDOW: Final = re.compile(r"(?:([a-z,-]+) +)?(\d\d):(\d\d)-(\d\d):(\d\d)")
_SCALE: Final = {None: 1, "k": 10**3, "M": 10**6, "G": 10**9}

_KeyT = TypeVar("_KeyT", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Window:
    """``days``: 0 is Monday; minutes of the day, half-open. One that ends at or before its beginning goes on until then
    on the next day."""

    days: frozenset[int]
    start: int
    end: int

    def holds(self, local: datetime.datetime) -> bool:
        today, yesterday = local.weekday(), (local.weekday() - 1) % 7
        minute = local.hour * 60 + local.minute
        if self.start < self.end:
            return today in self.days and self.start <= minute < self.end
        return (today in self.days and minute >= self.start) or (yesterday in self.days and minute < self.end)


def parse_rate(text: str) -> int:
    """Bytes per second of ``50MB/s`` or ``400Mbit/s``, decimal. Raises ``ValueError``."""
    found = _RATE.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{text!r} is not a rate such as 50MB/s or 400Mbit/s")
    number, scale, unit = found.groups()
    rate = int(float(number) * _SCALE[scale] / (8 if unit == "bit/s" else 1))
    if not BYTES_PER_S_MIN <= rate <= BYTES_PER_S_MAX:
        raise ValueError(f"{text!r} is outside of {BYTES_PER_S_MIN // 1000} kB/s to {BYTES_PER_S_MAX // 10**9} GB/s")
    return rate


def parse_window(text: str) -> Window:
    """Of ``mon-fri 08:00-18:00``, ``sat,sun 00:00-24:00`` or ``22:00-06:00`` (every day). Raises ``ValueError``."""
    found = _WINDOW.fullmatch(" ".join(text.lower().split()))
    if found is None:
        raise ValueError(f"{text!r} is not a window such as 'mon-fri 08:00-18:00'")
    days, *clock = found.groups()
    (start, end) = (_minute(clock[0], clock[1]), _minute(clock[2], clock[3]))
    if start == _DAY_MINUTES:
        raise ValueError("a window begins before 24:00")
    return Window(frozenset(range(7)) if days is None else _days(days), start, end)


def check_rule(rule: LimitRule) -> None:
    """Raises ``ValueError`` with what is wrong."""
    if not BYTES_PER_S_MIN <= rule.bytes_per_s <= BYTES_PER_S_MAX:
        raise ValueError(f"{rule.bytes_per_s} bytes per second are no rate for a limit")
    if rule.during:
        parse_window(rule.during)
    try:
        ZoneInfo(rule.time_zone)
    except (ZoneInfoNotFoundError, OSError, ValueError) as error:
        raise ValueError(f"there is no time zone {rule.time_zone!r}") from error


def rate_at(rules: Sequence[LimitRule], now_s: float) -> int | None:
    """What ``rules`` allow at that moment (seconds since the epoch); None: no limit."""
    scheduled = [rule.bytes_per_s for rule in rules if rule.during and _holds(rule, now_s)]
    always = [rule.bytes_per_s for rule in rules if not rule.during]
    return min(scheduled or always, default=None)


def shares(total: int, wants: Mapping[_KeyT, float]) -> dict[_KeyT, int]:
    """``total`` divided: nobody gets less than an equal part unless it wants less, and what nobody wants is given to
    all in equal parts, so that whoever wants more than was thought finds it."""
    left, given = float(total), {}
    for position, (who, want) in enumerate(sorted(wants.items(), key=lambda item: item[1])):
        given[who] = min(want, left / (len(wants) - position))
        left -= given[who]
    return {who: int(share + left / len(wants)) for who, share in given.items()}


def _holds(rule: LimitRule, now_s: float) -> bool:
    return parse_window(rule.during).holds(datetime.datetime.fromtimestamp(now_s, ZoneInfo(rule.time_zone)))


def _days(text: str) -> frozenset[int]:
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if first not in DAYS or (dash and last not in DAYS):
            raise ValueError(f"{part!r} is not a day or a range of days such as mon-fri")
        low = DAYS.index(first)
        high = DAYS.index(last) if dash else low
        found.update(day % 7 for day in range(low, high + 1 if high >= low else high + 8))
    return frozenset(found)


def _minute(hour: str, minute: str) -> int:
    value = int(hour) * 60 + int(minute)
    if int(minute) > 59 or value > _DAY_MINUTES:
        raise ValueError(f"{hour}:{minute} is not a time of the day")
    return value
