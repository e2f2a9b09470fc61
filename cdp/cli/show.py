"""How things look: JSON for scripts, tables and bars for people, one way to write sizes, ages and times."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click
import msgspec

from cdp.cli.errors import PartMissing

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

F = TypeVar("F", bound=Callable[..., Any])

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")


def print_json(value: Any) -> None:
    click.echo(msgspec.json.format(msgspec.json.encode(value)).decode())


def console() -> Console:
    """Where people look; a pipe gets plain text that is wide enough not to be cut."""
    _require_rich()
    from rich.console import Console  # noqa: PLC0415

    return Console(highlight=False, width=None if sys.stdout.isatty() else 200)


def table(*columns: str, title: str | None = None) -> Table:
    _require_rich()
    from rich.box import SIMPLE_HEAD  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    made = Table(box=SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for column in columns:
        made.add_column(column, overflow="fold")
    return made


def progress() -> Progress:
    """A bar with rate and time left, on standard error, so that output can be piped."""
    _require_rich()
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def size(amount: float | None) -> str:
    if amount is None:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(amount) < 1024 or unit == "TiB":
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    raise AssertionError


def age(seconds: float | None) -> str:
    """``3.2 s``, ``4 min 10 s``, ``23 h 41 min``, ``6 d 2 h``."""
    if seconds is None:
        return "-"
    if seconds < 100:
        return f"{seconds:.1f} s"
    whole = int(seconds)
    for unit, length, below, part in (("min", 60, 3600, 1), ("h", 3600, 86400, 60), ("d", 86400, None, 3600)):
        if below is None or whole < below:
            rest = whole % length // part
            tail = {1: "s", 60: "min", 3600: "h"}[part]
            return f"{whole // length} {unit} {rest} {tail}"
    raise AssertionError


def moment(at_s: float | None) -> str:
    """Local time with its offset, to the millisecond."""
    if at_s is None:
        return "-"
    when = datetime.datetime.fromtimestamp(at_s, datetime.UTC).astimezone()
    return when.isoformat(sep=" ", timespec="milliseconds")


def _require_rich() -> None:
    try:
        import rich  # noqa: F401, PLC0415
    except ImportError:
        raise PartMissing(
            "This installation has only what a protected machine needs.",
            remedy="Install the operator's part: pip install 'cdp-standby[server]'.",
        ) from None
