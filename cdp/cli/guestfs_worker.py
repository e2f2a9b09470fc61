"""Reads files out of an exported image with libguestfs: what ``cdp ls`` and ``cdp cp`` start.

    stdin    one JSON object: the request
    stdout   JSON lines: {"progress": [done, total]}, then {"result": …} or {"error": sentence, "remedy": …}

It runs with the system's Python, because that is where the distribution puts libguestfs's binding: the standard library
and ``guestfs`` are all that it has, and ``cdp`` never imports it. The disks are added read-only, which for libguestfs
means an overlay: the guest kernel replays the file systems' journals into it, and nothing is written to the image.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path
from typing import Any, Final

ENTRIES_MAX: Final = 100_000
"""Of one listed directory."""
NO_FILE_SYSTEM: Final = ("swap", "unknown", "")
ENOENT: Final = 2


class Refused(Exception):
    def __init__(self, sentence: str, remedy: str) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.remedy = remedy


def main() -> None:
    request = json.load(sys.stdin)
    try:
        _tell(result=_run(request))
    except Refused as error:
        _tell(error=error.sentence, remedy=error.remedy)


def _run(request: dict[str, Any]) -> Any:
    try:
        import guestfs  # noqa: PLC0415 (its absence has to be told as JSON)
    except ImportError:
        raise Refused("libguestfs's Python binding is missing.", "Install the package python3-guestfs.") from None
    guest = guestfs.GuestFS(python_return_dict=True)
    try:
        for disk in request["disks"]:
            guest.add_drive_opts(
                disk, format="raw", readonly=True, protocol="nbd", server=[f"unix:{request['socket']}"]
            )
        _launch(guest)
        _mount(guest, request["filesystem"])
        if request["action"] == "ls":
            return _list(guest, request["path"])
        guest.set_event_callback(_on_progress, guestfs.EVENT_PROGRESS)
        return _copy(guest, request["path"], Path(request["into"]))
    except RuntimeError as error:
        raise Refused(f"libguestfs: {error}.", "Is there room for temporary files?") from None
    finally:
        guest.close()


def _launch(guest: Any) -> None:
    try:
        guest.launch()
    except RuntimeError as error:
        raise Refused(
            f"libguestfs cannot start its virtual machine: {str(error).splitlines()[0]}",
            "Run 'libguestfs-test-tool'. It needs a kernel of the distribution (package linux-image-amd64) and its "
            "modules, readable by you.",
        ) from None


def _mount(guest: Any, wanted: str | None) -> None:
    """The file system that was asked for; or those of the one operating system; or the only one there is."""
    if wanted is not None:
        guest.mount_ro(wanted, "/")
        return
    roots = guest.inspect_os()
    if len(roots) == 1:
        points = guest.inspect_get_mountpoints(roots[0])
        for point in sorted(points, key=len):
            try:
                guest.mount_ro(points[point], point)
            except RuntimeError:
                # A line of its fstab that does not hold here: what can be read is read.
                if point == "/":
                    raise
        return
    found = {device: kind for device, kind in guest.list_filesystems().items() if kind not in NO_FILE_SYSTEM}
    if len(found) == 1:
        guest.mount_ro(next(iter(found)), "/")
        return
    if not found:
        raise Refused("No file system was found on the disks.", "Recover the disk and look at it with other tools.")
    listed = ", ".join(f"{device} ({kind})" for device, kind in sorted(found.items()))
    raise Refused("It is not clear which file system is meant.", f"Name one with --filesystem: {listed}.")


def _list(guest: Any, path: str) -> list[dict[str, Any]]:
    if not _exists(guest, path):
        raise _missing(path)
    if guest.is_dir(path, followsymlinks=True):
        names = guest.ls(path)
        if len(names) > ENTRIES_MAX:
            raise Refused(f"{path} has {len(names)} entries.", f"At most {ENTRIES_MAX} are listed; copy it instead.")
        stats, links = guest.lstatnslist(path, names), guest.readlinklist(path, names)
        rows = zip(names, stats, links, strict=True)
    else:
        link = guest.readlink(path) if guest.is_symlink(path) else ""
        rows = zip([path], [guest.lstatns(path)], [link], strict=True)
    return [
        {
            "name": name,
            "mode": stat.filemode(one["st_mode"]),
            "uid": one["st_uid"],
            "gid": one["st_gid"],
            "size_bytes": one["st_size"],
            "modified_s": one["st_mtime_sec"] + one["st_mtime_nsec"] / 1e9,
            "link": link,
        }
        for name, one, link in rows
    ]


def _copy(guest: Any, path: str, into: Path) -> dict[str, Any]:
    """Into the empty directory ``into``, under its own name."""
    if not _exists(guest, path):
        raise _missing(path)
    path = guest.realpath(path)
    name = Path(path).name or "root"
    if guest.is_dir(path):
        target = into / name
        if path == "/":
            target.mkdir()
            guest.copy_out("/", str(target))
        else:
            guest.copy_out(path, str(into))
        return {"name": name, "kind": "directory"}
    if not guest.is_file(path):
        raise Refused(f"{path} is neither a file nor a directory.", "Devices, pipes and sockets have no content.")
    guest.download(path, str(into / name))
    one = guest.statns(path)
    os.chmod(into / name, one["st_mode"] & 0o777)  # noqa: PTH101
    os.utime(into / name, ns=(one["st_mtime_sec"] * 10**9 + one["st_mtime_nsec"],) * 2)
    return {"name": name, "kind": "file"}


def _exists(guest: Any, path: str) -> bool:
    try:
        return bool(guest.exists(path))
    except RuntimeError:
        if guest.last_errno() == ENOENT:
            return False
        raise


def _missing(path: str) -> Refused:
    return Refused(f"{path} does not exist there.", "'cdp ls' of a directory above it shows what does.")


def _on_progress(event: int, handle: int, data: bytes, numbers: list[int]) -> None:  # noqa: ARG001
    _tell(progress=numbers[2:4])


def _tell(**what: Any) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
