"""``make demo``: a PostgreSQL machine is protected, followed and taken over while a client commits without pause.

    python -m deploy.lab.demo --mode planned|unplanned

Prints what happens and a timeline, and ends with exactly one line of JSON:

    {"verdict": "pass"|"fail", "mode": .., "downtime_s": .., "rows_acked": .., "rows_missing": .., "loss_s": ..,
     "phases": {..}}

``downtime_s`` is what the client saw: the last commit that the source acknowledged to the first that the standby did.
The exit code is 0 if and only if the verdict is "pass". Nothing is left running, whatever happens; the logs of the
last run are in build/demo/MODE.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import click

from deploy.lab import layout, server, source_vm, timeline
from deploy.lab.client import DATABASE, SCHEMA, USER, read_log
from deploy.lab.errors import LabFailed
from deploy.lab.lab import Lab
from deploy.lab.layout import default_layout, host
from deploy.lab.network import inside
from deploy.lab.programs import run, wait_until
from deploy.lab.wheels import REPOSITORY
from journal.errors import CdpError

DOWNTIME_MAX_S = 30.0
"""Planned, without hardware virtualisation: what the demonstration has to show."""
LOSS_MAX_S = 2.0
"""Unplanned: the last segment may be on its way."""


ROWS_BEFORE = 50
ROWS_AFTER = 50
FLOW_DEADLINE_S = 240.0
TAKEOVER_DEADLINE_S = 400.0
CHECK_DEADLINE_S = 240.0
CLIENT = "client"
TAKEOVER = "takeover"


class Demo:
    def __init__(self, mode: str, out: Path, downtime_s_max: float) -> None:
        self._mode = mode
        self._downtime_s_max = downtime_s_max
        # Of its own name: a lab that somebody works in is left alone.
        self._lab = Lab(default_layout("cdp-demo"), progress=click.echo, keep_logs=out)
        self._log = self._lab.where.logs / "client-commits.log"
        self._service = host(layout.SERVICE_ADDRESSES[0])

    def run(self) -> dict[str, Any]:
        """The last line's content."""
        self._lab.down()
        try:
            self._lab.up()
            self._prepare_database()
            self._start_client()
            self._lab.protect()
            self._wait_rows(ROWS_BEFORE, "the client's load on the ready standby")
            return self._take_over()
        finally:
            self._lab.down()

    def _prepare_database(self) -> None:
        self._lab.say("database")
        script = (
            f"CREATE ROLE {USER} LOGIN;\nCREATE DATABASE {DATABASE} OWNER {USER};\n\\connect {DATABASE}\n"
            f"CREATE EXTENSION amcheck;\nSET ROLE {USER};\n{SCHEMA};\n"
        )
        command = [*source_vm.ssh_command(self._lab.where), "runuser -u postgres -- psql -qX -v ON_ERROR_STOP=1"]
        run(command, input_text=script, deadline_s=120)

    def _start_client(self) -> None:
        self._lab.processes.start(
            CLIENT,
            inside(
                self._lab.where.client_namespace,
                *(sys.executable, "-m", "deploy.lab.client", "load", self._service, str(self._log)),
            ),
            environment={"PYTHONPATH": str(REPOSITORY)},
        )
        self._wait_rows(1, "the client's first commit")

    def _wait_rows(self, count: int, what: str) -> None:
        start = len(read_log(self._log))
        wait_until(lambda: len(read_log(self._log)) >= start + count, FLOW_DEADLINE_S, what)

    def _take_over(self) -> dict[str, Any]:
        lab = self._lab
        arguments = ["takeover", layout.MACHINE, "--json"]
        lab.say(f"takeover, {self._mode}")
        started_s = time.monotonic()
        if self._mode == "unplanned":
            lab.processes.kill(source_vm.PROCESS)
            lab.say("the source machine was killed")
            arguments += ["--unplanned", "--source-is-down"]
        killed_s = time.monotonic()
        command = lab.processes.start(TAKEOVER, server.cdp_as_operator(lab.where, *arguments))
        wait_until(
            lambda: timeline.acknowledged_by_successor(read_log(self._log)) >= ROWS_AFTER or not command.alive,
            FLOW_DEADLINE_S,
            "the client's commits on the standby",
        )
        wait_until(lambda: not command.alive, TAKEOVER_DEADLINE_S, "the end of `cdp takeover`")
        wait_until(
            lambda: timeline.acknowledged_by_successor(read_log(self._log)) >= ROWS_AFTER,
            FLOW_DEADLINE_S,
            "the client's commits on the standby",
        )
        record = self._record()
        lab.processes.stop(CLIENT)
        commits = read_log(self._log)
        rows = timeline.compare(commits, self._rows(), killed_s)
        self._check_indexes()
        seen = timeline.seen(commits)
        assert seen is not None, "the successor has acknowledged commits"
        self._print_timeline(record, seen, started_s)
        problems = self._problems(record, rows, seen)
        for problem in problems:
            lab.say(f"PROBLEM: {problem}")
        return {
            "verdict": "fail" if problems else "pass",
            "mode": self._mode,
            "downtime_s": round(seen.downtime_s, 3),
            "rows_acked": rows.acked,
            "rows_missing": len(rows.missing),
            "loss_s": round(rows.loss_s, 3),
            "phases": _phases(record),
        }

    def _record(self) -> dict[str, Any]:
        (record, *_) = server.cdp_json(self._lab.where, "takeovers", layout.MACHINE)
        assert isinstance(record, dict)
        (self._lab.where.logs / "takeover-record.json").write_text(json.dumps(record, indent=1))
        return record

    def _rows(self) -> list[int]:
        """What the table has, asked at the service address."""
        self._lab.say("comparing the acknowledged rows with the table")
        command = ["env", f"PYTHONPATH={REPOSITORY}", sys.executable, "-m", "deploy.lab.client", "rows", self._service]
        text = run(inside(self._lab.where.client_namespace, *command), deadline_s=CHECK_DEADLINE_S)
        return [int(line) for line in text.split()]

    def _check_indexes(self) -> None:
        """pg_amcheck on the standby; it exits with an error if anything is wrong."""
        self._lab.say("pg_amcheck")
        source_vm.ssh(
            self._lab.where,
            f"cd / && runuser -u postgres -- /usr/lib/postgresql/15/bin/pg_amcheck --heapallindexed -d {DATABASE}",
            deadline_s=CHECK_DEADLINE_S,
            address=layout.STANDBY_ADDRESS,
        )

    def _problems(self, record: dict[str, Any], rows: timeline.Rows, seen: timeline.Seen) -> list[str]:
        found = []
        if record["state"] not in {"running", "committed"}:
            found.append(f"the takeover is {record['state']}")
        if rows.doubled or rows.stray:
            found.append(f"rows twice: {rows.doubled[:10]}, rows that nobody sent: {rows.stray[:10]}")
        if seen.first_after.number <= seen.last_before.number:
            found.append("the sequence does not go on")
        if self._mode == "planned":
            if rows.missing:
                found.append(f"{len(rows.missing)} acknowledged rows are missing, the first is {rows.missing[0]}")
            if seen.downtime_s > self._downtime_s_max:
                found.append(f"the downtime of {seen.downtime_s:.1f} s is above {self._downtime_s_max:.0f} s")
        elif rows.loss_s > LOSS_MAX_S:
            found.append(f"the loss of {rows.loss_s:.2f} s is above {LOSS_MAX_S:.0f} s")
        return found

    def _print_timeline(self, record: dict[str, Any], seen: timeline.Seen, started_s: float) -> None:
        """The client's times and the controller's phases on one axis; both clocks are this host's."""
        wall_offset_s = time.time() - time.monotonic()
        events = [
            (started_s, "the takeover is asked for" if self._mode == "planned" else "the source is killed"),
            (seen.last_before.acknowledged_s, "client: last commit acknowledged by the source"),
            (seen.first_after.acknowledged_s, "client: first commit acknowledged by the standby"),
        ]
        for phase in record["timeline"]:
            ended_s = phase["ended_s"]
            took = "" if ended_s is None else f", {ended_s - phase['started_s']:.2f} s"
            events.append((phase["started_s"] - wall_offset_s, f"{phase['phase']}: {phase['outcome']}{took}"))
        click.echo("\ntimeline, seconds since the start")
        for at_s, text in sorted(events):
            click.echo(f"{at_s - started_s:9.2f}  {text}")
        click.echo(f"downtime that the client saw: {seen.downtime_s:.2f} s\n")


def _phases(record: dict[str, Any]) -> dict[str, float]:
    """Phase -> seconds; a phase that was tried more than once counts in full."""
    phases: dict[str, float] = {}
    for phase in record["timeline"]:
        if phase["ended_s"] is not None:
            took_s = phase["ended_s"] - phase["started_s"]
            phases[phase["phase"]] = round(phases.get(phase["phase"], 0.0) + took_s, 3)
    return phases


def _failure(mode: str) -> dict[str, Any]:
    unknown: dict[str, Any] = dict.fromkeys(("downtime_s", "rows_acked", "rows_missing", "loss_s"))
    return {"verdict": "fail", "mode": mode, **unknown, "phases": {}}


def _end(_number: int, _frame: FrameType | None) -> None:
    """SIGTERM ends the demonstration the way Ctrl-C does: through every ``finally``."""
    raise KeyboardInterrupt


@click.command()
@click.option("--mode", type=click.Choice(["planned", "unplanned"]), default="planned", show_default=True)
@click.option(
    "--downtime-max",
    "downtime_s_max",
    type=float,
    default=DOWNTIME_MAX_S,
    show_default=True,
    help="Seconds above which a planned takeover has failed.",
)
def main(mode: str, downtime_s_max: float) -> None:
    """Protect a machine under load, take it over, and prove what became of every row. Needs root."""
    signal.signal(signal.SIGTERM, _end)
    out = REPOSITORY / "build" / "demo" / mode
    shutil.rmtree(out, ignore_errors=True)
    try:
        result = Demo(mode, out, downtime_s_max).run()
    except (CdpError, KeyboardInterrupt) as error:
        click.echo(f"demo: {error or 'interrupted'}", err=True)
        if isinstance(error, LabFailed):
            click.echo(f"The logs are in {out}.", err=True)
        result = _failure(mode)
    click.echo(json.dumps(result))
    sys.exit(0 if result["verdict"] == "pass" else 1)


if __name__ == "__main__":
    main()
