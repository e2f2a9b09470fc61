"""``cdp takeover``, ``rollback``, ``commit``, ``retry`` and ``takeovers``."""

from __future__ import annotations

import sys
import time
from typing import Any, Final

import click

from cdp.cli.client import Client, connect, name_in
from cdp.cli.errors import NotAsAsked, ServerUnreachable
from cdp.cli.show import console, json_option, moment, print_json, table
from cdp.cli.status import timeline
from cdp.server import messages as m
from journal.errors import BadRequest

POLL_S: Final = 20.0
SERVER_AWAY_S: Final = 60.0
"""How long a server that went away while we watch may take to come back."""

Record = dict[str, Any]

_wait_option = click.option(
    "--wait/--no-wait", default=True, show_default=True, help="Show the phases until it is over, or return at once."
)


@click.command()
@click.argument("name")
@click.option("--unplanned", is_flag=True, help="The source is gone: go on from the last stored second.")
@click.option("--source-is-down", is_flag=True, help="Your word, instead of its silence, that the source is off.")
@click.option("--force", is_flag=True, help="Take the addresses although somebody still answers there.")
@_wait_option
@json_option
def takeover(name: str, *, unplanned: bool, source_is_down: bool, force: bool, wait: bool, as_json: bool) -> None:
    """Move NAME to its standby.

    Planned (the source is alive): its services are stopped, the last second is replicated, the source gives its
    addresses up, the standby takes over; nothing is lost. If anything fails before the source is fenced, the source
    goes on; afterwards 'cdp rollback' brings it back.

    Unplanned: the standby goes on from the last recovery point that was stored.

    Exit code 5 if it ended otherwise than running on the standby.

    \b
    Examples:
      cdp takeover db1
      cdp takeover db1 --unplanned --source-is-down
      cdp takeover db1 --json
    """
    if source_is_down and not unplanned:
        raise BadRequest("--source-is-down belongs to --unplanned.", remedy="See 'cdp takeover --help'.")
    client = connect()
    request = m.TakeoverRequest(
        mode="unplanned" if unplanned else "planned", source_is_down=source_is_down, force=force
    )
    record = client.send("POST", name_in(m.MACHINE_TAKEOVERS, name), request, Record)
    _follow(client, record, wait=wait, as_json=as_json, wanted={"running", "committed"})


@click.command()
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_wait_option
@json_option
def rollback(name: str, yes: bool, wait: bool, as_json: bool) -> None:
    """Go back to the source of NAME's latest, planned takeover, or cancel it while it still can be.

    What was written on the standby since the takeover is lost. The standby follows again afterwards.

    \b
    Example:
      cdp rollback db1
    """
    client = connect()
    record = _latest(client, name)
    if record["state"] == "running" and not yes:
        click.confirm(
            f"Everything written on the standby of {name} since {moment(record['running_s'])} will be lost. Go on?",
            abort=True,
            err=True,
        )
    record = client.send("POST", name_in(m.ROLLBACK, record["id"]), None, Record)
    _follow(client, record, wait=wait, as_json=as_json, wanted={"rolled-back", "failed"})


@click.command()
@click.argument("name")
@json_option
def commit(name: str, as_json: bool) -> None:
    """Make NAME's latest takeover final: the source will not be needed any more.

    \b
    Example:
      cdp commit db1
    """
    client = connect()
    _print(client.send("POST", name_in(m.COMMIT, _latest(client, name)["id"]), None, Record), as_json)


@click.command()
@click.argument("name")
@_wait_option
@json_option
def retry(name: str, wait: bool, as_json: bool) -> None:
    """Try again what has stalled in NAME's latest takeover, after its cause was removed.

    \b
    Example:
      cdp retry db1
    """
    client = connect()
    record = client.send("POST", name_in(m.RETRY, _latest(client, name)["id"]), None, Record)
    _follow(client, record, wait=wait, as_json=as_json, wanted={"running", "committed", "rolled-back"})


@click.command()
@click.argument("name")
@json_option
def takeovers(name: str, as_json: bool) -> None:
    """List the takeovers of NAME, the newest first.

    \b
    Example:
      cdp takeovers db1
    """
    found = connect().get(list[Record], name_in(m.MACHINE_TAKEOVERS, name))
    if as_json:
        print_json(found)
        return
    shown = table("id", "started", "by", "mode", "state", "downtime")
    for record in found:
        downtime = "-" if record["downtime_s"] is None else f"{record['downtime_s']:.2f} s"
        shown.add_row(
            record["id"], moment(record["created_s"]), record["actor"], record["mode"], record["state"], downtime
        )
    console().print(shown)


def _latest(client: Client, name: str) -> Record:
    found = client.get(list[Record], name_in(m.MACHINE_TAKEOVERS, name))
    if not found:
        raise BadRequest(f"{name!r} has never been taken over.", remedy="See 'cdp takeover --help'.")
    return found[0]


def _follow(client: Client, record: Record, *, wait: bool, as_json: bool, wanted: set[str]) -> None:
    """Show the record until it has settled; raise ``NotAsAsked`` unless it did where it should."""
    if wait:
        record = _watch_quietly(client, record) if as_json or not sys.stdout.isatty() else _watch(client, record)
    if as_json:
        print_json(record)
    elif not wait or not sys.stdout.isatty():
        console().print(timeline(record))
    if wait and (record["state"] not in wanted or record["stalled"] is not None):
        trouble = record["stalled"] or record["reason"] or {}
        raise NotAsAsked(
            f"The takeover is {record['state']}"
            + (", stalled" if record["stalled"] else "")
            + (f": {trouble['sentence']}" if trouble else "."),
            remedy=trouble.get("remedy") or "See 'cdp status'.",
        )


def _watch(client: Client, record: Record) -> Record:
    from rich.live import Live  # noqa: PLC0415

    with Live(timeline(record), console=console(), auto_refresh=False) as live:
        while not record["settled"]:
            record = _next(client, record)
            live.update(timeline(record), refresh=True)
    return record


def _watch_quietly(client: Client, record: Record) -> Record:
    while not record["settled"]:
        record = _next(client, record)
    return record


def _next(client: Client, record: Record) -> Record:
    """The next version of the record. A server that restarts meanwhile goes on with the takeover, so we wait for it."""
    path = name_in(m.TAKEOVER, record["id"])
    end = time.monotonic() + SERVER_AWAY_S
    while True:
        try:
            return client.get(Record, path, after_version=record["version"], wait_s=POLL_S)
        except ServerUnreachable:
            if time.monotonic() > end:
                raise
            time.sleep(1.0)


def _print(record: Record, as_json: bool) -> None:
    if as_json:
        print_json(record)
    else:
        console().print(timeline(record))
