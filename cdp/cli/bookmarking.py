"""What ``cdp bookmark add`` and ``cdp agent bookmark`` share. Imports nothing that a protected machine lacks."""

from __future__ import annotations

import click

from cdp.cli.show import moment, print_json
from journal import wire
from journal.position import Position

note_option = click.option("--note", default="", help="For whoever reads the list.")
timeout_option = click.option(
    "--timeout",
    type=click.FloatRange(1, wire.BOOKMARK_WAIT_S_MAX),
    default=110.0,
    show_default=True,
    help="Seconds for preparing, freezing and storing.",
)


def show_added(made: wire.BookmarkInfo, as_json: bool) -> None:
    if as_json:
        print_json(made)
        return
    where = Position.parse(made.position).short
    click.echo(f"{made.name}: {moment(made.sealed_at_s)}, position {where}, {made.consistency}-consistent")
    for line in made.hooks.splitlines():
        click.echo(f"  {line}")
