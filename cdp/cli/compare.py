"""``cdp compare``: do source, store and standby hold the same, block for block?"""

from __future__ import annotations

from typing import Final

import click

from cdp.cli import proof
from cdp.cli.client import connect, name_in
from cdp.cli.errors import NothingDone, ProofFailed
from cdp.cli.show import age, console, json_option, moment, print_json, size, table
from cdp.server import proof_messages as pm
from journal.position import Position

SHOWN: Final = 20


@click.command()
@click.argument("name")
@click.option("--last", is_flag=True, help="Show the last result; compare nothing.")
@click.option(
    "--standby/--no-standby", default=None, help="With or without the standby.  [default: if it is connected]"
)
@click.option("--reseed", is_flag=True, help="Let the standby compare its disks with the store, and mend them.")
@json_option
def compare(name: str, *, last: bool, standby: bool | None, reseed: bool, as_json: bool) -> None:
    """Prove that source, store and standby of NAME hold the same at one position, while the source writes on.

    The source reads its disks; the standby stops at the same position for as long as it reads its own, while the store
    goes on. Sectors that are written at that very moment cannot be compared and are told as unsettled. Nothing is
    changed, and interrupting this command does not end the comparison.

    \b
    Exit codes: 0 all agree, 1 something differs or could not be compared.

    \b
    Examples:
      cdp compare db1
      cdp compare db1 --last --json
      cdp compare db1 --reseed            # after the standby was found to differ
    """
    client = connect()
    path = name_in(pm.COMPARE, name)
    if reseed:
        client.raw("POST", name_in(pm.RESEED, name))
        click.echo("the standby compares its disks with the store: see 'cdp status'", err=True)
        return
    if last:
        report = client.get(pm.CompareAnswer, path).last
    else:
        request = pm.CompareRequest(standby=standby)
        report = proof.run(client, path, request, pm.CompareAnswer, lambda answer: answer.phase or "comparing").last
    if report is None:
        raise NothingDone(f"{name!r} has not been compared yet.", remedy="Run 'cdp compare' without --last.")
    if as_json:
        print_json(report)
    else:
        _show(report)
    if not report.success:
        sentence = report.error or f"{report.differing_bytes} bytes differ."
        raise ProofFailed(sentence, remedy=report.remedy or "Repeat the comparison.")


def _show(report: pm.CompareReport) -> None:
    out = console()
    if report.position is None:
        return
    sides = "source, store and standby" if report.standby else "source and store"
    verdict = "agree" if report.success else "do not agree"
    out.print(
        f"{sides} {verdict} at {Position.parse(report.position).short}, {moment(report.sealed_at_s)}: "
        f"{size(report.compared_bytes)} compared in {age(report.ended_s - report.started_s)}, "
        f"{size(report.unsettled_bytes)} unsettled, {size(report.differing_bytes)} differ"
    )
    if report.differing:
        shown = table("differs", "disk", "from byte", "bytes")
        for part in report.differing[:SHOWN]:
            shown.add_row(part.with_what, str(part.disk), str(part.offset), str(part.length))
        out.print(shown)
