"""``cdp export``: the disks of a recovery point over NBD, at once, for as long as the command runs."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path
from types import FrameType

import click

from cdp.cli.client import connect
from cdp.cli.nbd import Listen, hold, nbd
from cdp.cli.point import choose_disk, find_point, point_options, short_name
from cdp.cli.show import json_option, moment, print_json, size
from cdp.server import messages as m


class _ListenType(click.ParamType[Listen]):
    name = "unix:PATH|HOST:PORT"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Listen:
        text = str(value)
        if text.startswith("unix:") and len(text) > len("unix:"):
            return Listen(Path(text.removeprefix("unix:")).absolute())
        host, _, port = text.rpartition(":")
        if host and port.isascii() and port.isdigit() and 1 <= int(port) <= 65535:
            return Listen(None, host.strip("[]"), int(port))
        return self.fail(f"{text!r} is neither unix:PATH nor HOST:PORT.", param, ctx)


@click.command()
@click.argument("name")
@point_options
@click.option("--disk", help="Number or name of the disk to serve.  [default: all, each under its name]")
@click.option("--listen", type=_ListenType(), help="Where to serve.  [default: a Unix socket of your own]")
@json_option
def export(
    name: str,
    *,
    at: float | None,
    bookmark: str | None,
    latest: bool,
    disk: str | None,
    listen: Listen | None,
    as_json: bool,
) -> None:
    """Serve the disks of NAME as they were at any stored second, read-only, over NBD.

    Nothing is copied first. The recovery point is held, whatever the retention, until the command is ended with Ctrl-C.
    NBD has no passwords: whoever reaches HOST:PORT can read the disks, a Unix socket is as private as its directory.

    \b
    Examples:
      cdp export db1 --at '2026-11-23 14:05:30' --listen unix:/run/db1.sock
      qemu-img convert 'nbd+unix:///vda?socket=/run/db1.sock' vda.qcow2
      qemu-img create -f qcow2 -F raw -b 'nbd+unix:///vda?socket=/run/db1.sock' overlay.qcow2
      guestfish --ro --format=raw -a 'nbd://?socket=/run/db1.sock' -i
    """
    client = connect()
    point = find_point(client, name, at, bookmark, latest=latest)
    disks = point.disks if disk is None else [choose_disk(point, disk)]
    # systemd and scripts end it as Ctrl-C does; and a shell starts what runs in the background with SIGINT ignored.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupt)
    with tempfile.TemporaryDirectory(prefix="cdp-export-", dir=os.environ.get("XDG_RUNTIME_DIR")) as own:
        where = listen or Listen(Path(own) / "nbd.sock")
        try:
            with hold(client, point) as held, nbd(held, where, disks) as server:
                _tell(point, where, [(short_name(one), one.size_bytes) for one in disks], as_json=as_json)
                server.wait()
                raise server.failed()
        except KeyboardInterrupt:
            click.echo("ended", err=True)


def _tell(point: m.PointAnswer, where: Listen, disks: list[tuple[str, int]], *, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "machine": point.name,
                "position": point.position,
                "sealed_at_s": point.sealed_at_s,
                "uris": {name: where.uri(name) for name, _ in disks},
            }
        )
        return
    click.echo(f"{point.name} at {moment(point.sealed_at_s)}; end with Ctrl-C")
    for name, size_bytes in disks:
        click.echo(f"  {where.uri(name)}  {size(size_bytes)}")


def _interrupt(_: int, __: FrameType | None) -> None:
    raise KeyboardInterrupt
