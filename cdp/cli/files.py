"""``cdp ls`` and ``cdp cp``: files out of a recovery point, without recovering the disk.

    image ─► nbdkit ─► libguestfs: a small virtual machine, which finds partitions, LVM and file systems
                          └─ an overlay takes what replaying the file systems' journals writes; it is thrown away

A recovery point is what a power cut leaves: a file system's journal has to be replayed before it is read, by the code
that wrote it. The virtual machine's kernel does that; this host's never mounts what it cannot trust.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click
import msgspec

from cdp.cli.client import connect
from cdp.cli.errors import FilesFailed, OutputExists
from cdp.cli.nbd import Listen, hold, nbd
from cdp.cli.point import choose_disk, find_point, point_options, short_name
from cdp.cli.show import console, json_option, moment, print_json, progress, size, table

WORKER: Final = Path(__file__).with_name("guestfs_worker.py")
SYSTEM_PYTHON: Final = "/usr/bin/python3"
_libc = ctypes.CDLL(None, use_errno=True)

filesystem_option = click.option(
    "--filesystem", metavar="DEVICE", help="As 'cdp ls' names it, for example /dev/sda2, when there are several."
)
disk_option = click.option("--disk", help="Number or name of the disk to look at.  [default: all of them together]")


@click.command()
@click.argument("name")
@click.argument("path")
@point_options
@disk_option
@filesystem_option
@json_option
def ls(  # noqa: PLR0917 (as click passes them)
    name: str,
    path: str,
    at: float | None,
    bookmark: str | None,
    latest: bool,
    disk: str | None,
    filesystem: str | None,
    as_json: bool,
) -> None:
    """List a directory of NAME as it was at any stored second.

    \b
    Examples:
      cdp ls db1 --at '2026-11-23 14:05:30' /etc
      cdp ls db1 --bookmark before-upgrade --filesystem /dev/sdb1 / --json
    """
    request = {"action": "ls", "path": _absolute(path), "filesystem": filesystem}
    found = _ask(name, (at, bookmark, latest), disk, request, _ignore)
    if as_json:
        print_json(found)
        return
    shown = table("mode", "owner", "size", "changed", "name")
    for one in found:
        arrow = f" -> {one['link']}" if one["link"] else ""
        owner = f"{one['uid']}:{one['gid']}"
        shown.add_row(one["mode"], owner, size(one["size_bytes"]), moment(one["modified_s"]), one["name"] + arrow)
    console().print(shown)


@click.command()
@click.argument("name")
@click.argument("path")
@click.argument("destination", type=click.Path(path_type=Path))
@point_options
@disk_option
@filesystem_option
@click.option("--overwrite", is_flag=True, help="Replace a file that exists.")
@json_option
def cp(  # noqa: PLR0917 (as click passes them)
    name: str,
    path: str,
    destination: Path,
    at: float | None,
    bookmark: str | None,
    latest: bool,
    disk: str | None,
    filesystem: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Copy a file, or a directory with all that is in it, out of NAME as it was at any stored second.

    It appears under its name only when it is complete. A DESTINATION that is a directory keeps the name of PATH.

    \b
    Examples:
      cdp cp db1 --at '2026-11-23 14:05:30' /etc/postgresql/15/main/pg_hba.conf .
      cdp cp db1 --at -2h /srv/uploads ./uploads-two-hours-ago
    """
    path = _absolute(path)
    target = destination / (Path(path).name or name) if destination.is_dir() else destination
    if (target.exists() or target.is_symlink()) and not (overwrite and target.is_file()):
        raise OutputExists(f"{target} exists.", remedy="Give another name, or say --overwrite for a file.")
    into = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        into.mkdir(mode=0o700)
        with progress() as bar:
            task = bar.add_task("copying", total=None)
            made = _ask(
                name,
                (at, bookmark, latest),
                disk,
                {"action": "cp", "path": path, "filesystem": filesystem, "into": str(into.absolute())},
                lambda done, total: bar.update(task, completed=done, total=total),
            )
        _sync(into / made["name"])
        (into / made["name"]).rename(target)
        _sync(target.parent)
    except OSError as error:
        raise FilesFailed(
            f"{target} cannot be written: {error.strerror or error}.", remedy="Check room and permissions there."
        ) from error
    finally:
        shutil.rmtree(into, ignore_errors=True)
    if as_json:
        print_json({"machine": name, "path": path, "destination": str(target), "kind": made["kind"]})


def _ask(
    name: str,
    which: tuple[float | None, str | None, bool],
    disk: str | None,
    request: dict[str, Any],
    on_progress: Callable[[int, int], None],
) -> Any:
    """The worker's result for ``request``, put to the recovery point that was asked for."""
    client = connect()
    at, bookmark, latest = which
    point = find_point(client, name, at, bookmark, latest=latest)
    disks = point.disks if disk is None else [choose_disk(point, disk)]
    click.echo(f"{point.name} at {moment(point.sealed_at_s)}", err=True)
    with tempfile.TemporaryDirectory(prefix="cdp-files-") as directory, hold(client, point) as held:
        socket = Path(directory) / "nbd.sock"
        with nbd(held, Listen(socket), disks):
            names = [short_name(one) for one in disks]
            return _work({**request, "socket": str(socket), "disks": names}, on_progress)


def _work(request: dict[str, Any], on_progress: Callable[[int, int], None]) -> Any:
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    # Without libvirt in between: nothing of ours is to be defined or seen there.
    env.setdefault("LIBGUESTFS_BACKEND", "direct")
    words = ["setpriv", "--pdeathsig", "TERM", SYSTEM_PYTHON, "-I", str(WORKER)]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, env=env)
        with process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(msgspec.json.encode(request))
            process.stdin.close()
            told: dict[str, Any] = {}
            for line in process.stdout:
                told = msgspec.json.decode(line)
                if "progress" in told:
                    on_progress(*told["progress"])
        if "result" in told:
            return told["result"]
        if "error" in told:
            raise FilesFailed(told["error"], remedy=told["remedy"])
        said.seek(0)
        last = said.read().decode(errors="replace").strip().splitlines()[-1:] or ["no words"]
        raise FilesFailed(f"libguestfs ended with {last[0]}.", remedy="Run 'libguestfs-test-tool'.")


def _absolute(path: str) -> str:
    """Paths are those of the recovered machine, which has no working directory."""
    if not path.startswith("/"):
        raise click.BadParameter("a path there begins with '/'.", param_hint="PATH")
    return os.path.normpath(path).replace("//", "/")


def _sync(path: Path) -> None:
    """Durable on return: a file by itself, a tree with the file system that it lies on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if not path.is_dir():
            os.fsync(descriptor)
        elif _libc.syncfs(descriptor) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    finally:
        os.close(descriptor)


def _ignore(_: int, __: int) -> None:
    """A listing needs no bar."""
