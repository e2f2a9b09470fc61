"""Which recovery point, and which of its disks: the options that ``recover``, ``export``, ``ls`` and ``cp`` share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

import click

from cdp.cli.client import Client, name_in
from cdp.cli.show import moment
from cdp.cli.times import Time
from cdp.server import messages as m
from journal import wire
from journal.errors import BadRequest, CdpError

F = TypeVar("F", bound=Callable[..., Any])

NS: Final = 1_000_000_000


def point_options(command: F) -> F:
    """``--at``, ``--bookmark`` and ``--latest``: at most one of them; none is the newest recovery point."""
    for option in (
        click.option("--latest", is_flag=True, help="The newest recovery point (the default)."),
        click.option("--bookmark", metavar="BOOKMARK", help="The recovery point that carries this name."),
        click.option("--at", "at", type=Time(), default=None, help="The second to go back to."),
    ):
        command = option(command)
    return command


def find_point(client: Client, name: str, at: float | None, bookmark: str | None, *, latest: bool) -> m.PointAnswer:
    """Raises ``NoRecoveryPoint`` with the nearest ones in its remedy."""
    if (at is not None) + (bookmark is not None) + latest > 1:
        raise click.UsageError("--at, --bookmark and --latest exclude each other.")
    query: dict[str, str] = {}
    if at is not None:
        query["at"] = f"{at:.6f}"
    if bookmark is not None:
        query["bookmark"] = bookmark
    try:
        return client.get(m.PointAnswer, name_in(m.POINT, name), **query)
    except CdpError as error:
        if nearest := _nearest(error.fields):
            raise type(error)(error.sentence, remedy=f"The nearest: {nearest}.", **error.fields) from None
        raise


def choose_disk(point: m.PointAnswer, wanted: str | None) -> wire.DiskInfo:
    """By number or name; None: the only one. Raises ``BadRequest``."""
    names = ", ".join(f"{disk.index} ({disk.name})" for disk in point.disks)
    if wanted is None and len(point.disks) == 1:
        return point.disks[0]
    if wanted is None:
        raise BadRequest(f"{point.name!r} has several disks.", remedy=f"Choose one with --disk: {names}.")
    for disk in point.disks:
        if wanted in {str(disk.index), disk.name, disk.name.removeprefix("/dev/")}:
            return disk
    raise BadRequest(f"{point.name!r} has no disk {wanted!r}.", remedy=f"It has {names}.")


def short_name(disk: wire.DiskInfo) -> str:
    """Without directories: good for a file or an NBD export."""
    return disk.name.rsplit("/", 1)[-1]


def _nearest(fields: dict[str, Any]) -> str:
    times = [fields.get("before_ns"), fields.get("after_ns")]
    # To the millisecond, upwards: --at takes all of a millisecond.
    return " and ".join(moment(-(-at_ns // 1_000_000) / 1000) for at_ns in times if at_ns is not None)
