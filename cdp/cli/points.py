"""``cdp points``: which seconds of a machine there are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import click

from cdp.cli.client import Client, connect, name_in
from cdp.cli.show import age, console, json_option, moment, print_json, size, table
from cdp.cli.times import Time
from cdp.server import messages as m
from journal.position import Position

SHOWN: Final = 20


@click.command()
@click.argument("name")
@click.option("--from", "start", type=Time(), default="-1h", show_default=True, help="Earliest time.")
@click.option("--to", "end", type=Time(), default="latest", show_default=True, help="Latest time.")
@click.option("--limit", type=click.IntRange(1), default=SHOWN, show_default=True, help="How many are listed.")
@click.option("--all", "list_all", is_flag=True, help="List all of the span; --json always does.")
@json_option
def points(name: str, *, start: float | None, end: float | None, limit: int, list_all: bool, as_json: bool) -> None:
    """List the recovery points of NAME in a span of time: how much changed up to each, and which have a bookmark; and
    the fuzzy intervals, in which there are none.

    \b
    Examples:
      cdp points db1
      cdp points db1 --from -24h --limit 100
      cdp points db1 --from '2026-11-23 14:00' --to '2026-11-23 15:00' --json
    """
    query = {"from": f"{start or 0:.6f}"} | ({} if end is None else {"to": f"{end + 0.000001:.6f}"})
    pages = _pages(connect(), name, query, None if as_json or list_all else limit)
    found = next(pages)
    if as_json or list_all:
        for page in pages:
            found.points[:0], found.fuzzy[:0], found.bookmarks[:0] = page.points, page.fuzzy, page.bookmarks
        found.truncated = False
    if as_json:
        print_json(found)
    else:
        _show(found)


def _pages(client: Client, name: str, query: dict[str, Any], limit: int | None) -> Iterator[m.PointsAnswer]:
    """The newest first; each is asked for up to where the one before begins."""
    at_once = min(limit or m.POINTS_MAX, m.POINTS_MAX)
    while True:
        page = client.get(m.PointsAnswer, name_in(m.POINTS, name), **query, limit=at_once)
        yield page
        if not page.truncated or not page.points:
            return
        # An interval that ends at the border is told by the older page. Times are told as floats: a microsecond less,
        # so that no point comes twice.
        query = {**query, "to": f"{page.points[0][0] - 0.000001:.6f}"}


def _show(found: m.PointsAnswer) -> None:
    out = console()
    if found.points:
        first, last = found.points[0][0], found.points[-1][0]
        span = f"{moment(first)} .. {moment(last)} ({age(last - first)})"
        out.print(f"{len(found.points)} recovery points, {span}, {size(sum(point[2] for point in found.points))}")
    else:
        out.print("no recovery points in this span")
    if found.truncated:
        out.print("the newest ones; there are more: --limit, --all, or another span")
    named: dict[str, list[str]] = {}
    for bookmark in found.bookmarks:
        mark = " (application)" if bookmark.consistency == "application" else ""
        named.setdefault(bookmark.position, []).append(bookmark.name + mark)
    shown = table("time", "position", "changed", "bookmarks")
    for at_s, position, stored_bytes in found.points:
        short = Position.parse(position).short
        shown.add_row(moment(at_s), short, size(stored_bytes), ", ".join(named.get(position, ())))
    out.print(shown)
    for gap in found.fuzzy:
        out.print(f"fuzzy  {moment(gap.start_s)} .. {'still open' if gap.end_s is None else moment(gap.end_s)}")
