"""``cdp bookmark``: name recovery points, keep them, forget them."""

from __future__ import annotations

import click

from cdp.cli.bookmarking import note_option, show_added, timeout_option
from cdp.cli.client import connect, name_in
from cdp.cli.show import console, json_option, moment, print_json, table
from cdp.cli.times import Time
from cdp.server import messages as m
from journal import wire
from journal.position import Position

_ANSWER_MARGIN_S = 10.0


@click.group()
def bookmark() -> None:
    """Name recovery points, so that they are found again: before an upgrade, after a nightly run.

    \b
    Examples:
      cdp bookmark add db1 before-upgrade --application --hold
      cdp bookmark list db1
      cdp recover db1 --bookmark before-upgrade -o db1.qcow2
      cdp bookmark remove db1 before-upgrade
    """


@bookmark.command()
@click.argument("machine")
@click.argument("name")
@click.option("--at", type=Time(), default="now", show_default=True, help="A time in the past.")
@click.option("--application", is_flag=True, help="Hold the machine still: run its freeze hooks, freeze, cut, thaw.")
@click.option("--hold", is_flag=True, help="Retention stops at it until it is released or removed.")
@note_option
@timeout_option
@json_option
def add(
    machine: str,
    name: str,
    *,
    at: float | None,
    application: bool,
    hold: bool,
    note: str,
    timeout: float,
    as_json: bool,
) -> None:
    """Give the recovery point of now, or of an earlier time, the NAME.

    Crash-consistent: a state that a power cut could have left. Application-consistent: the hooks of the machine's
    agent.toml hold its applications still at that very point; if they cannot, there is no bookmark.

    Without --hold a bookmark expires when retention folds its recovery point.

    \b
    Examples:
      cdp bookmark add db1 before-upgrade --application --note 'ticket 4711'
      cdp bookmark add db1 last-good --at '2026-11-23 14:05:30' --hold
    """
    client = connect()
    client.answer_s = timeout + _ANSWER_MARGIN_S
    request = wire.BookmarkRequest(name=name, note=note, application=application, hold=hold, at_s=at, wait_s=timeout)
    if application:
        click.echo(f"{machine} prepares, freezes and thaws ...", err=True)
    show_added(client.send("POST", name_in(m.BOOKMARKS, machine), request, wire.BookmarkInfo), as_json)


@bookmark.command("list")
@click.argument("machine")
@json_option
def list_(machine: str, as_json: bool) -> None:
    """List the bookmarks of MACHINE, the oldest recovery point first.

    \b
    Example:
      cdp bookmark list db1 --json
    """
    found = connect().get(list[wire.BookmarkInfo], name_in(m.BOOKMARKS, machine))
    if as_json:
        print_json(found)
        return
    shown = table("name", "time", "position", "consistent", "", "note")
    for one in found:
        mark = "expired" if one.expired_at_s is not None else "held" if one.hold else ""
        position = Position.parse(one.position).short
        shown.add_row(one.name, moment(one.sealed_at_s), position, one.consistency, mark, one.note)
    console().print(shown)


@bookmark.command()
@click.argument("machine")
@click.argument("name")
def remove(machine: str, name: str) -> None:
    """Forget the bookmark NAME. Its recovery point stays for as long as retention keeps it.

    \b
    Example:
      cdp bookmark remove db1 before-upgrade
    """
    connect().raw("DELETE", name_in(m.BOOKMARK, machine, name))
    click.echo(f"{name} is removed.")


@bookmark.command()
@click.argument("machine")
@click.argument("name")
@click.option("--release", is_flag=True, help="Let retention go past it again.")
def hold(machine: str, name: str, release: bool) -> None:
    """Let retention stop at the bookmark NAME: the journal from there on is kept, and grows.

    \b
    Examples:
      cdp bookmark hold db1 before-upgrade
      cdp bookmark hold db1 before-upgrade --release
    """
    body = m.BookmarkHold(hold=not release)
    connect().send("PATCH", name_in(m.BOOKMARK, machine, name), body, wire.BookmarkInfo)
    click.echo(f"{name} is {'released' if release else 'held'}.")
