"""``cdp retention``: how much of a journal is kept, and how much that will be."""

from __future__ import annotations

import re
from typing import Any, Final

import click
import msgspec

from cdp.cli.client import connect, name_in
from cdp.cli.show import age, console, json_option, moment, print_json, size
from cdp.server import retention_messages as m

_LENGTH: Final = re.compile(r"(\d{1,9}(?:\.\d{1,3})?)(s|m|min|h|d)")
_SECONDS: Final = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
_AMOUNT: Final = re.compile(r"(\d{1,12}(?:\.\d{1,3})?)([KMGT]?)(?:i?B)?", re.IGNORECASE)
_FACTORS: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
NONE: Final = "none"


class Length(click.ParamType[float]):
    """A length of time in seconds; ``none``: 0."""

    name = "TIME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value).strip()
        if text == NONE:
            return 0.0
        found = _LENGTH.fullmatch(text)
        if found is None or not m.KEEP_S_MIN <= float(found[1]) * _SECONDS[found[2]] <= m.KEEP_S_MAX:
            self.fail(f"{value!r} is not a length of time. Examples: '24h', '90min', '7d', 'none'.", param, ctx)
        return float(found[1]) * _SECONDS[found[2]]


class Amount(click.ParamType[int]):
    """Bytes; ``none``: 0."""

    name = "BYTES"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        text = str(value).strip()
        if text == NONE:
            return 0
        found = _AMOUNT.fullmatch(text)
        if found is None or float(found[1]) == 0:
            self.fail(f"{value!r} is not an amount. Examples: '200G', '1.5T', '500MiB', 'none'.", param, ctx)
        return int(float(found[1]) * _FACTORS[found[2].upper()])


@click.group()
def retention() -> None:
    """Show or change how much of a machine's journal is kept.

    What is older than the limits is folded into the base image, the oldest recovery point, in the background.

    \b
    Examples:
      cdp retention show db1
      cdp retention set db1 --keep 24h --max-bytes 200G
    """


@retention.command()
@click.argument("name")
@json_option
def show(name: str, as_json: bool) -> None:
    """Show what the journal of NAME holds now, what it will hold at today's rate, and what is in the way.

    \b
    Examples:
      cdp retention show db1
      cdp retention show db1 --json | jq .will_hold_s
    """
    _print(connect().get(m.RetentionStatus, name_in(m.RETENTION, name)), as_json)


@retention.command(name="set")
@click.argument("name")
@click.option("--keep", type=Length(), help="Keep seconds for so long: 24h, 90min, 7d; or 'none': no limit by time.")
@click.option("--max-bytes", type=Amount(), help="Keep so much at most: 200G, 1.5T; or 'none': no limit by bytes.")
@click.option(
    "--past-standby/--not-past-standby",
    default=None,
    help="Fold also what the standby has not applied yet. It is compared anew when it comes back.",
)
@click.option("--default", "reset", is_flag=True, help="Back to the default of the server's configuration.")
@json_option
def set_(  # noqa: PLR0917 (options)
    name: str, keep: float | None, max_bytes: int | None, past_standby: bool | None, reset: bool, as_json: bool
) -> None:
    """Change what is kept of NAME's journal. What is not named stays as it is.

    Both limits count: whichever is reached first. Bookmarks that hold, and a standby that is behind, keep older seconds
    all the same; see 'cdp retention show'.

    \b
    Examples:
      cdp retention set db1 --keep 24h --max-bytes 200G
      cdp retention set db1 --keep 7d --max-bytes none
      cdp retention set db1 --past-standby        # the standby will be away for long
      cdp retention set db1 --default
    """
    given = {"keep_s": keep, "max_bytes": max_bytes, "past_standby": past_standby}
    changes: dict[str, float | int | bool | None] = {k: value for k, value in given.items() if value is not None}
    if reset == bool(changes):
        raise click.UsageError("Say what to change, or --default.")
    client, path = connect(), name_in(m.RETENTION, name)
    if reset:
        status = client.send("DELETE", path, None, m.RetentionStatus)
    else:
        policy = client.get(m.RetentionStatus, path).policy
        for limit in ("keep_s", "max_bytes"):
            if limit in changes:
                changes[limit] = changes[limit] or None
        status = client.send("PUT", path, msgspec.structs.replace(policy, **changes), m.RetentionStatus)
    _print(status, as_json)


def summary(kept: m.RetentionStatus) -> str:
    """One line: what the journal holds, and what it will hold."""
    text = f"journal holds {age(kept.holds_s)}" if kept.holds_s is not None else "journal holds no recovery point yet"
    if kept.will_hold_s is not None and kept.bytes_per_s:
        why = {"time": "as is asked for", "bytes": "limited by its bytes", "disk": "limited by the disk"}
        text += f"; at today's rate ({size(kept.bytes_per_s)}/s) it will hold {age(kept.will_hold_s)}"
        text += f", {why[kept.limited_by]}" if kept.limited_by else ""
    return text


def _print(kept: m.RetentionStatus, as_json: bool) -> None:
    if as_json:
        print_json(kept)
        return
    policy = kept.policy
    limits = [f"for {age(policy.keep_s)}" if policy.keep_s is not None else "without limit by time"]
    if policy.max_bytes is not None:
        limits.append(f"at most {size(policy.max_bytes)}")
    whose = "the server's default" if kept.is_default else "its own policy"
    lines = [f"kept {', '.join(limits)} ({whose})" + (", also past the standby" if policy.past_standby else "")]
    lines.append(summary(kept))
    lines.append(f"folded last {moment(kept.folded_at_s)}" + (", folding now" if kept.folding else ""))
    lines.append(f"free on the store's disk {size(kept.store_free_bytes)}")
    if kept.held_by:
        lines.append(f"! held back: {kept.held_by} {kept.remedy}")
    if kept.error is not None:
        lines.append(f"! {kept.error.get('sentence', '')} {kept.error.get('remedy', '')}")
    for line in lines:
        console().print(line, markup=False)
