"""``cdp points`` and ``cdp recover``: any second of a disk, as a file.

The image is streamed in verified pieces (each is a segment with its own digests), holes stay holes, and the file gets
its name only when it is complete and durable.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Final

import click

from cdp.cli.client import Client, connect, name_in
from cdp.cli.errors import OutputExists, RecoverFailed, ServerUnreachable
from cdp.cli.show import age, console, json_option, moment, print_json, progress, size, table
from cdp.cli.times import Time
from cdp.server import messages as m
from journal import wire
from journal.decoder import decode
from journal.errors import BadRequest, CdpError
from journal.extent import Kind
from journal.position import Position

RANGE_BYTES_MAX: Final = 64 << 20
RANGE_BYTES_MIN: Final = 1 << 20
RANGE_BYTES: Final = 16 << 20
"""One request: large enough that its round trip does not matter, small enough for a moving bar."""
SHOWN: Final = 20

Advance = Callable[[int], None]


@click.command()
@click.argument("name")
@click.option("--from", "start", type=Time(), default="-1h", show_default=True, help="Earliest time.")
@click.option("--to", "end", type=Time(), default="latest", show_default=True, help="Latest time.")
@json_option
def points(name: str, start: float | None, end: float | None, as_json: bool) -> None:
    """List the recovery points of NAME in a span of time, and the fuzzy intervals in which there are none.

    \b
    Examples:
      cdp points db1
      cdp points db1 --from '2026-11-23 14:00' --to '2026-11-23 15:00' --json
    """
    query = {"from": int(start or 0)} | ({} if end is None else {"to": int(end) + 1})
    found = connect().get(m.PointsAnswer, name_in(m.POINTS, name), **query)
    if as_json:
        print_json(found)
        return
    out = console()
    if found.points:
        first, last = found.points[0][0], found.points[-1][0]
        out.print(f"{len(found.points)} recovery points, {moment(first)} .. {moment(last)} ({age(last - first)})")
    else:
        out.print("no recovery points in this span")
    if found.truncated:
        out.print("only the newest are listed: name a shorter span")
    shown = table("time", "position")
    for at_s, position in found.points[-SHOWN:]:
        shown.add_row(moment(at_s), Position.parse(position).short)
    if len(found.points) > SHOWN:
        shown.title = f"the last {SHOWN}"
    out.print(shown)
    for gap in found.fuzzy:
        out.print(f"fuzzy  {moment(gap.start_s)} .. {'still open' if gap.end_s is None else moment(gap.end_s)}")


@click.command()
@click.argument("name")
@click.option("--at", "at", type=Time(), default="latest", show_default=True, help="The second to go back to.")
@click.option("--output", "-o", type=click.Path(path_type=Path, dir_okay=False), required=True, help="File to write.")
@click.option("--disk", help="Number or name of the disk.  [default: the only one]")
@click.option("--format", "format_", type=click.Choice(["raw", "qcow2"]), help="[default: by the file's suffix]")
@click.option("--overwrite", is_flag=True, help="Replace the file if it exists.")
@json_option
def recover(
    name: str, *, at: float | None, output: Path, disk: str | None, format_: str | None, overwrite: bool, as_json: bool
) -> None:
    """Write a disk of NAME as it was at any stored second.

    The newest recovery point at or before the time is taken: a state that the disks really had. The file is sparse,
    every byte is verified, and it appears under its name only when it is complete.

    \b
    Examples:
      cdp recover db1 -o db1.qcow2
      cdp recover db1 --at '2026-11-23 14:05:30' --disk vda -o before.raw
      cdp recover db1 --at -10m -o db1.qcow2
    """
    format_ = format_ or ("qcow2" if output.suffix == ".qcow2" else "raw")
    if output.exists() and not (overwrite and output.is_file()):
        raise OutputExists(f"{output} exists.", remedy="Say --overwrite, or give another file.")
    client = connect()
    point = client.get(m.PointAnswer, name_in(m.POINT, name), **({} if at is None else {"at": f"{at:.6f}"}))
    chosen = _choose(point, disk)
    click.echo(f"{name} {chosen.name} at {moment(point.sealed_at_s)} ({size(chosen.size_bytes)})", err=True)
    with progress() as bar:
        task = bar.add_task("recovering", total=chosen.size_bytes)
        written = write_image(
            client, point, chosen, output, format_=format_, advance=lambda done: bar.advance(task, done)
        )
    if as_json:
        print_json(
            {
                "machine": point.name,
                "disk": chosen.name,
                "position": point.position,
                "sealed_at_s": point.sealed_at_s,
                "output": str(output),
                "format": format_,
                "size_bytes": chosen.size_bytes,
                "written_bytes": written,
            }
        )


def write_image(
    client: Client, point: m.PointAnswer, disk: wire.DiskInfo, output: Path, *, format_: str, advance: Advance
) -> int:
    """Write the disk at ``point`` to ``output``; returns the bytes of data in it. ``advance`` is told of disk bytes."""
    partial = output.with_name(f".{output.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        written = _write_raw(client, point, disk, partial, advance)
        if format_ == "qcow2":
            _to_qcow2(partial, partial.with_suffix(".qcow2"))
            partial.with_suffix(".qcow2").rename(partial)
        _sync(partial)
        partial.rename(output)
        _sync(output.parent)
    except OSError as error:
        raise RecoverFailed(
            f"{output} cannot be written: {error}.", remedy="Choose a place with enough room, then repeat the command."
        ) from error
    finally:
        partial.unlink(missing_ok=True)
        partial.with_suffix(".qcow2").unlink(missing_ok=True)
    return written


def _write_raw(client: Client, point: m.PointAnswer, disk: wire.DiskInfo, out: Path, advance: Advance) -> int:
    path = wire.IMAGE.format(machine=point.machine)
    written = offset = 0
    step = RANGE_BYTES
    with out.open("xb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.truncate(disk.size_bytes)
        while offset < disk.size_bytes:
            length = min(step, disk.size_bytes - offset)
            try:
                raw = client.raw("GET", path, at=point.position, disk=disk.index, offset=offset, length=length)
            except CdpError as error:
                if error.code != "range-too-large" or step <= RANGE_BYTES_MIN:
                    raise
                step //= 2
                continue
            segment = decode(raw)
            if segment.header.previous != Position.parse(point.position).digest:
                raise ServerUnreachable("The server answered for another position.", remedy="Repeat the command.")
            for index, at, kind, size_bytes, data in segment.writes():
                if index != disk.index or at < offset or at + size_bytes > offset + length:
                    raise ServerUnreachable("The server answered for another range.", remedy="Repeat the command.")
                if kind == Kind.DATA and data is not None:
                    file.seek(at)
                    file.write(data)
                    written += size_bytes
            advance(length)
            offset += length
            # Empty space goes fast: look further ahead.
            step = min(step * 2, RANGE_BYTES_MAX) if segment.header.payload_bytes * 2 < length else RANGE_BYTES
    return written


def _to_qcow2(raw: Path, out: Path) -> None:
    if shutil.which("qemu-img") is None:
        raise RecoverFailed(
            "qemu-img is needed to write qcow2.", remedy="Install qemu-utils, or write --format raw instead."
        )
    done = subprocess.run(
        ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "--", str(raw), str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RecoverFailed(f"qemu-img failed: {done.stderr.strip()}.", remedy="Check the room on the disk.")


def _choose(point: m.PointAnswer, wanted: str | None) -> wire.DiskInfo:
    names = ", ".join(f"{disk.index} ({disk.name})" for disk in point.disks)
    if wanted is None and len(point.disks) == 1:
        return point.disks[0]
    if wanted is None:
        raise BadRequest(f"{point.name!r} has several disks.", remedy=f"Choose one with --disk: {names}.")
    for disk in point.disks:
        if wanted in {str(disk.index), disk.name, disk.name.removeprefix("/dev/")}:
            return disk
    raise BadRequest(f"{point.name!r} has no disk {wanted!r}.", remedy=f"It has {names}.")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
