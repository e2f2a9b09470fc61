"""Points in time as people write them."""

from __future__ import annotations

import datetime
import re
from typing import Any, Final

import click

_RELATIVE: Final = re.compile(r"-?(\d{1,9}(?:\.\d{1,6})?)(s|m|min|h|d)")
_CLOCK: Final = re.compile(r"(\d{1,2}):(\d{2})(?::(\d{2})(\.\d{1,6})?)?")
_SECONDS: Final = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


class Time(click.ParamType[float | None]):
    """``latest`` -> None, otherwise seconds since the Unix epoch."""

    name = "TIME"

    def __init__(self, now: datetime.datetime | None = None) -> None:
        self._now = now

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | None:
        if isinstance(value, float):
            return value
        now = self._now or datetime.datetime.now(datetime.UTC).astimezone()
        try:
            return parse(str(value), now)
        except (ValueError, OverflowError):
            self.fail(
                f"{value!r} is not a time. Examples: 'latest', '2026-11-23 14:05:30', '2026-11-23T14:05:30Z', "
                "'14:05:30' (today), '-90s', '-5m', '-2h', '@1795442730'.",
                param,
                ctx,
            )


def parse(text: str, now: datetime.datetime) -> float | None:
    """``now`` gives the day and the time zone for what is left out. Raises ``ValueError``."""
    text = text.strip()
    if text in {"latest", "now"}:
        return None
    if text.startswith("@"):
        return float(text[1:])
    if (relative := _RELATIVE.fullmatch(text)) is not None:
        return now.timestamp() - float(relative[1]) * _SECONDS[relative[2]]
    if (clock := _CLOCK.fullmatch(text)) is not None:
        micro = int(float(clock[4] or 0) * 1e6)
        at = now.replace(hour=int(clock[1]), minute=int(clock[2]), second=int(clock[3] or 0), microsecond=micro)
        return at.timestamp()
    at = datetime.datetime.fromisoformat(text)
    return (at if at.tzinfo is not None else at.replace(tzinfo=now.tzinfo)).timestamp()
