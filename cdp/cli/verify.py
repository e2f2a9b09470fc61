"""``cdp verify``: is everything that is stored of a machine what was written?"""

from __future__ import annotations

import click

from cdp.cli import proof
from cdp.cli.client import connect, name_in
from cdp.cli.errors import NothingDone, ProofFailed
from cdp.cli.show import age, console, json_option, moment, print_json, size, table
from cdp.server import proof_messages as pm


@click.command()
@click.argument("name")
@click.option("--last", is_flag=True, help="Show the last result; read nothing.")
@click.option("--repair", is_flag=True, help="Mend what can be mended: let the source send what is lost again.")
@json_option
def verify(name: str, last: bool, repair: bool, as_json: bool) -> None:
    """Read everything that is stored of NAME and check it: digests, chain, base image, index.

    A damage is told with the seconds that it costs: recovery points that need the lost bytes. They are refused, never
    served. The server does the same in the background, see [verify] in its configuration. Interrupting this command
    does not end the verification.

    \b
    Exit codes: 0 all is well, 1 damaged (or the last verification was) or not ended.

    \b
    Examples:
      cdp verify db1
      cdp verify db1 --repair
      cdp verify db1 --last --json
    """
    client = connect()
    path = name_in(pm.VERIFY, name)
    if last:
        report = client.get(pm.VerifyAnswer, path).last
    else:
        report = proof.run(client, path, pm.VerifyRequest(repair=repair), pm.VerifyAnswer, lambda _: "verifying").last
    if report is None:
        raise NothingDone(f"{name!r} has not been verified yet.", remedy="Run 'cdp verify' without --last.")
    if as_json:
        print_json(report)
    else:
        _show(report)
    if not report.success:
        raise ProofFailed(_sentence(report), remedy=_remedy(report))


def _show(report: pm.VerifyReport) -> None:
    out = console()
    out.print(
        f"verified {moment(report.ended_s)} in {age(report.ended_s - report.started_s)}: {report.segments} segments, "
        f"{size(report.read_bytes)}, {report.index_rows} rows of the index, {report.run_files} run files"
    )
    if report.damages:
        shown = table("what", "damage", "recovery points that it costs", "missing now")
        for line in report.damages:
            shown.add_row(line.kind, line.sentence, _cost(line), _missing(line))
        out.print(shown)
    if report.repair:
        out.print(f"repair: {report.repair}")


def _cost(line: pm.DamageLine) -> str:
    if not line.costs:
        return "none"
    first = "the oldest" if line.first_s is None else moment(line.first_s)
    return f"{first} .. {'now' if line.until_s is None else moment(line.until_s)}"


def _missing(line: pm.DamageLine) -> str:
    return "unknown" if line.lost_bytes is None else size(line.lost_bytes)


def _sentence(report: pm.VerifyReport) -> str:
    if report.error:
        return f"The verification failed: {report.error}"
    if not report.complete:
        return f"The verification did not end; it found {report.damaged} damages so far."
    return f"{report.damaged} damages were found."


def _remedy(report: pm.VerifyReport) -> str:
    if report.damaged and not report.repair:
        return "Run 'cdp verify --repair', and check the disk of the server."
    return "When the source has sent everything again, run 'cdp verify' once more." if report.repair else "Repeat it."
