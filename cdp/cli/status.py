"""``cdp status``: one machine or all, once or live."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

import click

from cdp.cli.client import Client, connect, name_in
from cdp.cli.errors import ServerUnreachable
from cdp.cli.retention import summary
from cdp.cli.show import age, console, json_option, moment, print_json, size, table
from cdp.server import messages as m
from journal.wire import Progress

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

REFRESH_S: Final = 1.0


@click.command()
@click.argument("name", required=False)
@click.option("--watch", "-w", is_flag=True, help="Go on until interrupted, once a second.")
@json_option
def status(name: str | None, watch: bool, as_json: bool) -> None:
    """Show how replication, standby and takeover are: of NAME, or of all machines in short.

    Lag is the age of the newest data that has passed a stage. FUZZY means that a seed or a resync has not caught up:
    no recovery point is offered until it has.

    \b
    Examples:
      cdp status
      cdp status db1 --watch
      cdp status db1 --json | jq .stages
    """
    client = connect()
    if as_json:
        while True:
            print_json(_fetch(client, name))
            if not watch:
                return
            time.sleep(REFRESH_S)
    if not watch:
        console().print(_render(_fetch(client, name)))
        return
    from rich.live import Live  # noqa: PLC0415

    with Live(console=console(), auto_refresh=False) as live:
        while True:
            try:
                live.update(_render(_fetch(client, name)), refresh=True)
            except ServerUnreachable as error:
                live.update(str(error), refresh=True)
            time.sleep(REFRESH_S)


def print_machine(status: m.MachineStatus) -> None:
    console().print(_machine(status))


def timeline(takeover: dict[str, Any]) -> Table:
    """The phases of a takeover as a table."""
    title = f"takeover {takeover['id']}: {takeover['mode']}, {takeover['state']}"
    if takeover["downtime_s"] is not None:
        title += f", downtime {takeover['downtime_s']:.2f} s"
    shown = table("phase", "since start", "took", "outcome", title=title)
    for phase in takeover["timeline"]:
        ended, error = phase["ended_s"], phase["error"]
        outcome = phase["outcome"] or "…"
        shown.add_row(
            phase["phase"],
            f"{phase['started_s'] - takeover['created_s']:.2f} s",
            "" if ended is None else f"{ended - phase['started_s']:.2f} s",
            f"{outcome}: {error['sentence']}" if error else outcome,
        )
    return shown


def _fetch(client: Client, name: str | None) -> list[m.MachineStatus] | m.MachineStatus:
    if name is None:
        return client.get(list[m.MachineStatus], m.MACHINES)
    return client.get(m.MachineStatus, name_in(m.MACHINE, name))


def _render(found: list[m.MachineStatus] | m.MachineStatus) -> RenderableType:
    if isinstance(found, m.MachineStatus):
        return _machine(found)
    shown = table("machine", "source", "stored", "applied", "recovery point", "standby", "note")
    for one in found:
        stages = {stage.stage: stage for stage in one.stages}
        shown.add_row(
            one.name,
            one.agent.state if one.agent.connected else "away",
            _lag(stages.get("stored")),
            _lag(stages.get("applied")),
            "FUZZY" if one.fuzzy else moment(one.recovery_point_at_s),
            one.standby_state or "-",
            one.problems[0] if one.problems else "" if one.protected else "not protected",
        )
    return shown


def _machine(one: m.MachineStatus) -> RenderableType:
    from rich.console import Group  # noqa: PLC0415
    from rich.markup import escape  # noqa: PLC0415

    parts: list[RenderableType] = []
    owner = f"the {one.side} owns it" if one.protected else "not protected yet: cdp protect"
    parts.append(f"[bold]{escape(one.name)}[/]  {owner}  generation {one.generation}")
    parts.extend(f"[red]! {escape(problem)}[/]" for problem in one.problems)
    if one.protected:
        point = "none yet" if one.recovery_point_at_s is None else moment(one.recovery_point_at_s)
        fuzzy = f"  [yellow]FUZZY: {escape(one.fuzzy_reason or 'a copy has not caught up')}[/]" if one.fuzzy else ""
        parts.append(f"last recovery point  {point}{fuzzy}")
        parts.append(_stages(one))
        journal = one.journal
        span = None if journal.oldest_s is None or journal.newest_s is None else journal.newest_s - journal.oldest_s
        parts.append(f"journal  {size(journal.segment_bytes)} over {age(span)}, {size(journal.file_bytes)} on disk")
        if one.retention is not None:
            parts.append(f"  {summary(one.retention)}")
    parts.append(_peer("agent", one.agent))
    if one.agent.lost_events:
        parts.append(f"  writes not captured, and resynchronised: {one.agent.lost_events}")
    if one.standby is not None:
        parts.append(_peer("standby", one.standby, one.standby_state))
        parts.append(
            f"  domain {one.standby.domain or 'unknown'}, "
            f"kernel {'prepared' if one.standby.kexec_ready else 'not prepared yet'}"
        )
    if one.replica is not None:
        parts.append(_peer("replica", one.replica))
    if one.takeover is not None:
        parts.append(timeline(one.takeover))
    return Group(*parts)


def _stages(one: m.MachineStatus) -> Table:
    shown = table("stage", "lag", "to go", "at")
    for stage in one.stages:
        shown.add_row(stage.stage, age(stage.lag_s), size(stage.backlog_bytes), moment(stage.at_s))
    return shown


def _peer(what: str, peer: m.PeerStatus, state: str = "") -> str:
    text = f"{what}  {state or peer.state or 'unknown'}"
    if not peer.connected:
        silent = "never seen" if peer.last_heard_s is None else f"silent for {age(time.time() - peer.last_heard_s)}"
        text += f"  (not connected, {silent})"
    if peer.progress is not None:
        text += f"\n  {_progress(peer.progress)}"
    return text


def _progress(progress: Progress) -> str:
    share = 100 * progress.done_bytes / progress.total_bytes if progress.total_bytes else 0.0
    left = "" if progress.eta_s is None else f", {age(progress.eta_s)} left"
    return f"{progress.what}: {share:.1f} % of {size(progress.total_bytes)}, {size(progress.bytes_per_s)}/s{left}"


def _lag(stage: m.StageStatus | None) -> str:
    return "-" if stage is None else age(stage.lag_s)
