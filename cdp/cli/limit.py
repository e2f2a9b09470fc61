"""``cdp limit``: how much agents may send, and when."""

from __future__ import annotations

import click

from cdp.cli.client import connect, name_in
from cdp.cli.show import console, json_option, print_json, size, table
from cdp.server import limit_messages as m
from cdp.server.schedule import parse_rate, parse_window

_NAMES = click.option("--total", "is_total", is_flag=True, help="All machines together, instead of one.")
_DURING = click.option("--during", default=None, help="A window of the week, such as 'mon-fri 08:00-18:00'.")


@click.group()
def limit() -> None:
    """Limit what agents send, per machine and in total, maybe at certain hours.

    \b
    Examples:
      cdp limit set db1 20MB/s
      cdp limit set --total 400Mbit/s --during 'mon-fri 08:00-18:00' --time-zone Europe/Berlin
      cdp limit show
      cdp limit remove db1

    Journal traffic goes before seeds and resyncs. A journal that is above the limit by itself lags; when the agent's
    spool is half full it is sent faster than allowed, because otherwise writes would be lost, and that is shown.
    What standbys and recoveries read is not limited.
    """


@limit.command("set")
@click.argument("name_and_rate", nargs=-1, required=True, metavar="[NAME] RATE")
@_NAMES
@_DURING
@click.option("--time-zone", default="UTC", show_default=True, help="Of --during, such as Europe/Berlin.")
@json_option
def set_(name_and_rate: tuple[str, ...], is_total: bool, during: str | None, time_zone: str, as_json: bool) -> None:
    """Let NAME, or all machines together, send at most RATE, such as 50MB/s or 400Mbit/s.

    A rule for the same hours is replaced. Of the rules that hold at a moment, those with --during go before the one
    without; of several, the lowest counts.

    \b
    Examples:
      cdp limit set db1 20MB/s
      cdp limit set --total 10MB/s --during 'sat,sun 22:00-06:00'
    """
    *names, rate = name_and_rate
    scope = _scope(*names, is_total=is_total)
    try:
        if during is not None:
            parse_window(during)
        rule = m.LimitRule(bytes_per_s=parse_rate(rate), during=during or "", time_zone=time_zone)
    except ValueError as error:
        raise click.UsageError(f"{error}.") from None
    _show(connect().send("PUT", name_in(m.LIMIT, scope), rule, m.LimitsAnswer), as_json)


@limit.command()
@click.argument("name", required=False)
@_NAMES
@_DURING
@json_option
def remove(name: str | None, is_total: bool, during: str | None, as_json: bool) -> None:
    """Remove the rules of NAME or of the total: all of them, or with --during that one ('' for the one without).

    \b
    Example:
      cdp limit remove --total --during 'mon-fri 08:00-18:00'
    """
    path = name_in(m.LIMIT, _scope(*([name] if name else []), is_total=is_total))
    query = {} if during is None else {"during": during}
    _show(connect().send("DELETE", path, None, m.LimitsAnswer, **query), as_json)


@limit.command()
@json_option
def show(as_json: bool) -> None:
    """Show all rules, and what each machine may send and does send now.

    \b
    Example:
      cdp limit show --json
    """
    _show(connect().get(m.LimitsAnswer, m.LIMITS), as_json)


def _scope(*names: str, is_total: bool) -> str:
    if len(names) != (0 if is_total else 1):
        raise click.UsageError("Give either one machine's name or --total.")
    return m.TOTAL if is_total else names[0]


def _show(found: m.LimitsAnswer, as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    shown = table("", "rules", "may send now", "sends", "borrowed")
    shown.add_row("total", _rules(found.total_rules), _rate(found.total_bytes_per_s), "", "")
    for one in found.machines:
        sends, borrowed = _rate(one.sent_bytes_per_s), size(one.borrowed_bytes) if one.borrowed_bytes else "-"
        shown.add_row(one.name, _rules(one.rules), _rate(one.allowed_bytes_per_s), sends, borrowed)
    console().print(shown)


def _rules(rules: list[m.LimitRule]) -> str:
    return "\n".join(
        f"{_rate(rule.bytes_per_s)} {f'{rule.during} {rule.time_zone}' if rule.during else 'always'}" for rule in rules
    )


def _rate(bytes_per_s: int | None) -> str:
    return "no limit" if bytes_per_s is None else f"{bytes_per_s / 1e6:.3g} MB/s"
