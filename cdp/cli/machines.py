"""``cdp machines`` and ``cdp audit``."""

from __future__ import annotations

import click

from cdp.cli.client import connect, name_in
from cdp.cli.show import console, json_option, moment, print_json, size, table
from cdp.server import messages as m


@click.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")
@click.pass_context
def machines(ctx: click.Context, as_json: bool) -> None:
    """List, add and remove machines. Without a subcommand: list.

    \b
    Examples:
      cdp machines
      cdp machines add db1
      cdp machines remove db1 --force
    """
    if ctx.invoked_subcommand is None:
        _list(as_json)


@machines.command("list")
@json_option
def list_(as_json: bool) -> None:
    """List all machines."""
    _list(as_json)


@machines.command()
@click.argument("name")
@json_option
def add(name: str, as_json: bool) -> None:
    """Make the machine NAME known and print the command that enrols it.

    \b
    Example:
      cdp machines add db1
    """
    _print_token(connect().send("POST", m.MACHINES, m.NewMachine(name=name), m.TokenAnswer), as_json)


@machines.command()
@click.argument("name")
@json_option
def token(name: str, as_json: bool) -> None:
    """Print another join token for NAME: the last one expired, or the machine was installed anew.

    When it is used, the agent's credential before it ends.
    """
    _print_token(connect().send("POST", name_in(m.TOKENS, name), None, m.TokenAnswer), as_json)


@machines.command()
@click.argument("name")
def revoke(name: str) -> None:
    """End the credentials of NAME's agent and standby at once. Both have to be enrolled again."""
    ended = connect().send("DELETE", name_in(m.CREDENTIALS, name), None, m.Revoked)
    click.echo(f"{ended.credentials} credentials ended.")


@machines.command()
@click.argument("name")
@click.option("--force", is_flag=True, help="Although it is protected: its whole journal is deleted.")
def remove(name: str, force: bool) -> None:
    """Forget NAME: its standby, its credentials and its whole journal."""
    connect().raw("DELETE", name_in(m.MACHINE, name), force=int(force))
    click.echo(f"{name} is removed.")


@click.command()
@click.option("--limit", type=click.IntRange(1, m.AUDIT_MAX), default=50, show_default=True)
@json_option
def audit(limit: int, as_json: bool) -> None:
    """Show who did what, the newest first.

    \b
    Example:
      cdp audit --limit 10
    """
    lines = connect().get(list[m.AuditLine], m.AUDIT, limit=limit)
    if as_json:
        print_json(lines)
        return
    shown = table("time", "who", "what", "on", "details")
    for line in lines:
        details = ", ".join(f"{key}={value}" for key, value in line.details.items() if value)
        shown.add_row(moment(line.at_s), line.actor, line.action, line.subject, details)
    console().print(shown)


def _list(as_json: bool) -> None:
    found = connect().get(list[m.MachineStatus], m.MACHINES)
    if as_json:
        print_json(found)
        return
    shown = table("name", "disks", "size", "state", "agent", "standby", "machine")
    for one in found:
        shown.add_row(
            one.name,
            str(len(one.disks)),
            size(sum(disk.size_bytes for disk in one.disks)),
            "protected" if one.protected else "known",
            one.agent.state if one.agent.connected else "away",
            one.standby_state or "-",
            one.machine,
        )
    console().print(shown)


def _print_token(issued: m.TokenAnswer, as_json: bool) -> None:
    if as_json:
        print_json(issued)
        return
    click.echo(f"cdp join {issued.url} {issued.token}")
    click.echo(f"Run this on the machine. Valid once, until {moment(issued.expires_at_s)}.", err=True)
