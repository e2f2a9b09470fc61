"""``cdp recover``: the disks of any second, as files.

The recovery point is held meanwhile. A file gets its name only when it is complete and durable; what an interrupted
command leaves is ``.NAME.partial``, which the next one begins anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import click

from cdp.cli.client import connect
from cdp.cli.errors import OutputExists, RecoverFailed
from cdp.cli.nbd import Held, hold
from cdp.cli.point import choose_disk, find_point, point_options, short_name
from cdp.cli.remoteimage import CONNECTIONS, RemoteImage
from cdp.cli.show import json_option, moment, print_json, progress, size
from cdp.imagefile import Advance, ImageFile
from journal import wire


@click.command()
@click.argument("name")
@point_options
@click.option("--output", "-o", type=click.Path(path_type=Path), required=True, help="File to write, or a directory.")
@click.option("--disk", help="Number or name of the disk.  [default: the only one; into a directory: all]")
@click.option("--format", "format_", type=click.Choice(["raw", "qcow2"]), help="[default: by the file's suffix]")
@click.option("--verify", is_flag=True, help="Read back what was written, and compare it with what was received.")
@click.option("--overwrite", is_flag=True, help="Replace a file that exists.")
@json_option
def recover(
    name: str,
    *,
    at: float | None,
    bookmark: str | None,
    latest: bool,
    output: Path,
    disk: str | None,
    format_: str | None,
    verify: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write disks of NAME as they were at any stored second.

    The newest recovery point at or before the time is taken: a state that the disks really had. A file is sparse, and
    appears under its name only when it is complete. The server checks every stored byte against its checksum before it
    sends it, and TLS keeps it whole on the way; --verify also checks what the disk here has made of it.

    \b
    Examples:
      cdp recover db1 -o db1.qcow2
      cdp recover db1 --at '2026-11-23 14:05:30' --disk vda -o before.raw
      cdp recover db1 --bookmark before-upgrade -o /srv/recovered/ --format qcow2
    """
    client = connect()
    point = find_point(client, name, at, bookmark, latest=latest)
    if output.is_dir():
        disks = point.disks if disk is None else [choose_disk(point, disk)]
        suffix = "qcow2" if format_ == "qcow2" else "raw"
        outputs = {output / f"{point.name}-{short_name(one)}.{suffix}": one for one in disks}
    else:
        outputs = {output: choose_disk(point, disk)}
    for path in outputs:
        if path.exists() and not (overwrite and path.is_file()):
            raise OutputExists(f"{path} exists.", remedy="Say --overwrite, or give another file.")
    told: list[dict[str, Any]] = []
    with hold(client, point) as held, progress() as bar:
        for path, one in outputs.items():
            click.echo(f"{name} {one.name} at {moment(point.sealed_at_s)} ({size(one.size_bytes)})", err=True)
            form = format_ or ("qcow2" if path.suffix == ".qcow2" else "raw")
            task = bar.add_task(f"recovering {one.name}", total=one.size_bytes * (2 if verify else 1))
            advance = functools.partial(bar.advance, task)
            written = write_image(held, one, path, form=form, verify=verify, advance=advance)
            told.append(
                {
                    "machine": point.name,
                    "disk": one.name,
                    "position": point.position,
                    "sealed_at_s": point.sealed_at_s,
                    "output": str(path),
                    "format": form,
                    "size_bytes": one.size_bytes,
                    "written_bytes": written,
                    "verified": verify,
                }
            )
    if as_json:
        print_json(told if output.is_dir() else told[0])


def write_image(held: Held, disk: wire.DiskInfo, output: Path, *, form: str, verify: bool, advance: Advance) -> int:
    """Write ``disk`` of the held image to ``output``; returns the bytes of data in it."""
    partial = output.with_name(f".{output.name}.partial")
    converted = output.with_name(f".{output.name}.converting")
    try:
        file = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            _claim(file, partial)
            try:
                image = ImageFile(RemoteImage(held, disk), partial, advance, threads=CONNECTIONS)
                image.write(check=verify)
                if form == "qcow2":
                    _to_qcow2(partial, converted)
                    converted.rename(output)
                else:
                    partial.rename(output)
            finally:
                # Before the lock is let go of: afterwards they may be another command's.
                partial.unlink(missing_ok=True)
                converted.unlink(missing_ok=True)
        finally:
            os.close(file)
        _sync_directory(output.parent)
    except OSError as error:
        raise RecoverFailed(
            f"{output} cannot be written: {error}.", remedy="Choose a place with enough room, then repeat the command."
        ) from error
    return image.written_bytes


def _claim(file: int, partial: Path) -> None:
    """The file is ours, and still the one of that name: whoever had it may have finished just now."""
    with contextlib.suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file).st_ino == partial.stat().st_ino:
            return
    raise RecoverFailed(f"Another command writes {partial}.", remedy="Wait for it, or give another file.")


def _to_qcow2(raw: Path, out: Path) -> None:
    if shutil.which("qemu-img") is None:
        raise RecoverFailed(
            "qemu-img is needed to write qcow2.", remedy="Install qemu-utils, or write --format raw instead."
        )
    # Read by whoever opens it by its name: the lock is ours, not qemu's.
    words = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "--", str(raw), str(out)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RecoverFailed(f"qemu-img failed: {done.stderr.strip()}.", remedy="Check the room on the disk.")
    descriptor = os.open(out, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
