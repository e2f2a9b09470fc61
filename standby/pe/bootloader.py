"""Which kernel would the replicated system start next, with which initrd and arguments? Asked of its boot loader.

/boot/loader/entries/*.conf   Boot Loader Specification (RHEL 8 and later, Fedora): the newest, or GRUB's saved entry
/boot/grub/grub.cfg,          GRUB's generated configuration: the default menu entry
/boot/grub2/grub.cfg
/boot/vmlinuz*                neither: the newest kernel, with the arguments of nobody
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from standby.pe.errors import SystemNotFound
from standby.pe.system import MountedSystem

_CONFIGURATIONS: Final = ("boot/grub/grub.cfg", "boot/grub2/grub.cfg")
_ENVIRONMENTS: Final = ("boot/grub/grubenv", "boot/grub2/grubenv")
_ENTRIES: Final = "boot/loader/entries"
WATCHED: Final = ("boot", "boot/grub", "boot/grub2", _ENTRIES, *_CONFIGURATIONS, *_ENVIRONMENTS)
"""Directories and files whose change may mean another kernel."""
_MENU: Final = re.compile(r"^\s*(menuentry|submenu)\s")
_SET: Final = re.compile(r"^\s*set\s+([A-Za-z_][A-Za-z0-9_]*)=(.*)$")
_VARIABLE: Final = re.compile(r"\$\{?([A-Za-z_][A-Za-z0-9_]*)\}?")


@dataclass(frozen=True, slots=True)
class BootEntry:
    """``kernel`` and ``initrd`` are paths inside the system, without the leading slash."""

    kernel: str
    initrd: str | None
    arguments: str


@dataclass(slots=True)
class _Menu:
    """A node of GRUB's menu. ``lines`` are a menu entry's commands."""

    title: str
    identity: str
    children: list[_Menu] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    is_submenu: bool = False


def default_entry(system: MountedSystem) -> BootEntry:
    """Raises ``SystemNotFound`` if no kernel is there."""
    environment = _environment(system)
    for found in (_from_bls(system, environment), _from_grub(system, environment), _newest_kernel(system)):
        if found is not None and system.path(found.kernel).is_file():
            return found
    raise SystemNotFound(
        "The replicated system has no kernel that its boot loader names.",
        remedy="GRUB (grub.cfg) or Boot Loader Specification entries are read; check /boot of the source.",
    )


def _from_bls(system: MountedSystem, environment: dict[str, str]) -> BootEntry | None:
    directory = system.path(_ENTRIES)
    if not directory.is_dir():
        return None
    entries: dict[str, dict[str, str]] = {}
    for path in directory.glob("*.conf"):
        lines = (line.partition(" ") for line in path.read_text(errors="replace").splitlines())
        entries[path.stem] = {key: value.strip() for key, _, value in lines if key and not key.startswith("#")}
    names = sorted((name for name in entries if entries[name].get("linux")), key=_version_key, reverse=True)
    if not names:
        return None
    chosen = entries[next((name for name in names if name == environment.get("saved_entry")), names[0])]
    initrd = chosen.get("initrd", "").split()
    arguments = _VARIABLE.sub(lambda match: environment.get(match[1], ""), chosen.get("options", ""))
    return _entry(system, chosen["linux"], initrd[0] if initrd else None, arguments)


def _from_grub(system: MountedSystem, environment: dict[str, str]) -> BootEntry | None:
    path = next((path for name in _CONFIGURATIONS if (path := system.path(name)).is_file()), None)
    if path is None:
        return None
    top, variables = _parse_grub(path.read_text(errors="replace"), environment)
    chosen = _choose(top, environment.get("saved_entry") or _substituted(variables.get("default", "0"), variables))
    if chosen is None:
        return None
    kernel, initrd, arguments = None, None, ""
    for line in chosen.lines:
        command, _, rest = line.strip().partition(" ")
        words = _words(_substituted(rest, variables))
        if command in ("linux", "linux16", "linuxefi") and words:
            kernel, arguments = words[0], shlex.join(words[1:]) if any(" " in w for w in words) else " ".join(words[1:])
        elif command in ("initrd", "initrd16", "initrdefi") and words:
            # Several: microcode first, the real one last. Microcode is of no use to a virtual machine.
            initrd = words[-1]
    return None if kernel is None else _entry(system, kernel, initrd, arguments)


def _parse_grub(text: str, environment: dict[str, str]) -> tuple[_Menu, dict[str, str]]:
    """The menu, and the last unconditional-looking value of each variable."""
    variables = dict(environment)
    top = _Menu("", "", is_submenu=True)
    stack = [top]
    depth_of_entry = [0]
    depth = 0
    for line in text.splitlines():
        stripped = line.strip()
        if _MENU.match(line) and stripped.endswith("{"):
            words = _words(stripped[:-1])
            identity = next((words[at + 1] for at, word in enumerate(words[:-1]) if "menuentry_id_option" in word), "")
            node = _Menu(words[1] if len(words) > 1 else "", identity, is_submenu=words[0] == "submenu")
            stack[-1].children.append(node)
            stack.append(node)
            depth += 1
            depth_of_entry.append(depth)
        elif stripped == "}":
            if depth == depth_of_entry[-1] and len(stack) > 1:
                stack.pop()
                depth_of_entry.pop()
            depth = max(0, depth - 1)
        elif stripped.endswith("{"):
            depth += 1
        else:
            if len(stack) > 1:
                stack[-1].lines.append(stripped)
            if (match := _SET.match(line)) is not None:
                value = match[2].strip().strip("\"'")
                # `set default="${next_entry}"` and `set default="${saved_entry}"` hold only if there is one.
                if match[1] != "default" or _substituted(value, variables):
                    variables[match[1]] = _substituted(value, variables)
    return top, variables


def _choose(top: _Menu, wanted: str) -> _Menu | None:
    """``0``, ``1>2``, a title or an identity, at each level; the first one if there is no such."""
    node = top
    for part in wanted.split(">"):
        children = node.children
        by_number = children[int(part)] if part.isdigit() and int(part) < len(children) else None
        named = next((child for child in children if part and part in (child.title, child.identity)), None)
        found = named or by_number
        if found is None:
            break
        node = found
    while node.is_submenu:
        if not node.children:
            return None
        node = node.children[0]
    return node


def _newest_kernel(system: MountedSystem) -> BootEntry | None:
    boot = system.path("boot")
    kernels = sorted((path.name for path in boot.glob("vmlinuz-*")), key=_version_key) if boot.is_dir() else []
    if not kernels:
        return None
    release = kernels[-1].removeprefix("vmlinuz-")
    initrds = (f"initrd.img-{release}", f"initramfs-{release}.img", f"initrd-{release}")
    initrd = next((name for name in initrds if (boot / name).exists()), None)
    return BootEntry(f"boot/{kernels[-1]}", initrd and f"boot/{initrd}", f"root=UUID={system.filesystem.uuid} ro")


def _entry(system: MountedSystem, kernel: str, initrd: str | None, arguments: str) -> BootEntry:
    return BootEntry(_inside(system, kernel), None if initrd is None else _inside(system, initrd), arguments.strip())


def _inside(system: MountedSystem, path: str) -> str:
    """GRUB's paths start at the file system that holds /boot, which may be one of its own."""
    path = re.sub(r"^\([^)]*\)", "", path).lstrip("/")
    return path if system.path(path).exists() else f"boot/{path}"


def _environment(system: MountedSystem) -> dict[str, str]:
    for name in _ENVIRONMENTS:
        path = system.path(name)
        if path.is_file():
            return dict(_assignments(path.read_text(errors="replace")))
    return {}


def _assignments(text: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            yield key, value


def _substituted(text: str, variables: dict[str, str]) -> str:
    return _VARIABLE.sub(lambda match: variables.get(match[1], ""), text)


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text, comments=False)
    except ValueError:
        return text.split()


def _version_key(name: str) -> list[tuple[int, int, str]]:
    """6.1.0-9 < 6.1.0-10, numbers as numbers."""
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.findall(r"\d+|\D+", name)]


def watched_files(system: MountedSystem, entry: BootEntry) -> list[Path]:
    """What of the system decides about the next boot, as far as it exists."""
    names = [*WATCHED, entry.kernel, *([entry.initrd] if entry.initrd else [])]
    return [path for name in names if (path := system.path(name)).exists()]
