"""The distribution layer: a tree of extracted packages, thinned out, as one compressed cpio archive, and its kernel.

    mmdebstrap --variant=extract ─► packages.tar ─► merge bin, sbin, lib into usr ─► leave out ─► cpio ─► lz4
                                         │
                                         └─► modules ─► depmod ─► only those needed

No maintainer script runs, so the layer needs no chroot, and everything that a script would have made is made here.
"""

from __future__ import annotations

import io
import posixpath
import re
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

from standby.pe.image.bytecode import add_bytecode
from standby.pe.image.cpio import CpioWriter
from standby.pe.image.errors import ImageBuildFailed
from standby.pe.image.program import run
from standby.pe.image.recipe import DebianRecipe

_MERGED = ("bin", "sbin", "lib", "lib64", "lib32", "libx32")
_MODULE_METADATA = re.compile(r"modules\.(order|builtin|builtin\.modinfo)$")
_DEBOOTSTRAP_DEADLINE_S = 1800.0

LVM_LOCAL = """\
# There is no udev in the PE.
activation { udev_sync = 0  udev_rules = 0  monitoring = 0 }
devices { obtain_device_list_from_udev = 0  external_device_info_source = "none" }
backup { backup = 0  archive = 0 }
"""


def fetch_packages(recipe: DebianRecipe, mirror: str, out: Path) -> None:
    """Write the extracted packages of ``recipe`` as a tar archive to ``out``."""
    security = mirror.rstrip("/") + "-security"
    run(
        [
            "mmdebstrap",
            "--variant=extract",
            "--mode=root",
            "--format=tar",
            '--aptopt=Apt::Install-Recommends "false"',
            f"--include={','.join(recipe.packages)}",
            recipe.suite,
            str(out),
            f"deb {mirror} {recipe.suite} main",
            f"deb {mirror} {recipe.suite}-updates main",
            f"deb {security} {recipe.suite}-security main",
        ],
        deadline_s=_DEBOOTSTRAP_DEADLINE_S,
        log=out.with_suffix(".log"),
    )


class DebianLayer:
    """Turns the archive that ``fetch_packages`` wrote into the layer's files."""

    def __init__(self, recipe: DebianRecipe, packages: Path) -> None:
        self._recipe = recipe
        self._packages = packages

    def write(self, cpio_out: Path, kernel_out: Path) -> str:
        """Write the uncompressed archive and the kernel; return the kernel's release."""
        with (
            tempfile.TemporaryDirectory(prefix="cdp-pe-") as scratch,
            cpio_out.open("wb") as raw,
            CpioWriter(raw) as cpio,
            tarfile.open(self._packages) as tar,
        ):
            self._base(cpio)
            release = self._tree(tar, cpio, Path(scratch), kernel_out)
            self._modules(cpio, Path(scratch), release)
        return release

    def _base(self, cpio: CpioWriter) -> None:
        for name in _MERGED[:4]:
            cpio.directory(f"usr/{name}")
            cpio.symlink(name, f"usr/{name}")
        for name in ("proc", "sys", "dev", "run", "mnt", "root", "etc/lvm", "var/lib"):
            cpio.directory(name)
        cpio.directory("tmp", 0o1777)
        cpio.symlink("var/run", "/run")
        cpio.symlink("etc/mtab", "/proc/self/mounts")
        cpio.character_device("dev/console", 5, 1)
        cpio.file("etc/lvm/lvmlocal.conf", LVM_LOCAL.encode())
        cpio.file("etc/hosts", b"127.0.0.1 localhost\n::1 localhost\n")
        cpio.file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n")
        cpio.file("etc/group", b"root:x:0:\ndisk:x:6:\n")
        cpio.file("etc/cdp-pe/modules", "".join(f"{name}\n" for name in self._recipe.modules).encode())
        cpio.symlink("usr/bin/sh", "busybox")
        cpio.symlink("usr/bin/python3", "python3.11")

    def _tree(self, tar: tarfile.TarFile, cpio: CpioWriter, scratch: Path, kernel_out: Path) -> str:
        release = ""
        for member in tar:
            path = _merged(member.name)
            if path.startswith("boot/vmlinuz-") and member.isfile():
                release = path.removeprefix("boot/vmlinuz-")
                kernel_out.write_bytes(_content(tar, member))
            elif path.startswith("usr/lib/modules/"):
                self._keep_module_file(tar, member, path, scratch)
            elif not self._is_left_out(path) and path not in cpio:
                _copy(tar, member, path, cpio)
        if not release:
            raise ImageBuildFailed(
                "The extracted packages hold no kernel.", remedy="Name a linux-image package in the recipe."
            )
        return release

    def _is_left_out(self, path: str) -> bool:
        return any(path == prefix.rstrip("/") or path.startswith(prefix) for prefix in self._recipe.left_out)

    @staticmethod
    def _keep_module_file(tar: tarfile.TarFile, member: tarfile.TarInfo, path: str, scratch: Path) -> None:
        if member.isfile() and (path.endswith(".ko") or _MODULE_METADATA.search(path)):
            target = scratch / path.removeprefix("usr/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(_content(tar, member))

    def _modules(self, cpio: CpioWriter, scratch: Path, release: str) -> None:
        """Keep the wanted modules with everything that they need, and an index of exactly those."""
        tree = scratch / "lib" / "modules" / release
        run(["depmod", "-b", str(scratch), release], deadline_s=60)
        wanted = _closure(tree / "modules.dep", self._recipe.modules)
        for module in tree.rglob("*.ko"):
            if str(module.relative_to(tree)) not in wanted:
                module.unlink()
        run(["depmod", "-b", str(scratch), release], deadline_s=60)
        for file in sorted(path for path in tree.rglob("*") if path.is_file()):
            cpio.file(f"usr/lib/modules/{release}/{file.relative_to(tree)}", file.read_bytes())


def _closure(modules_dep: Path, names: Iterable[str]) -> set[str]:
    """The paths of ``names`` and of all modules they need. A name that is built in, or unknown, adds nothing."""
    needs: dict[str, list[str]] = {}
    by_name: dict[str, str] = {}
    for line in modules_dep.read_text().splitlines():
        path, _, rest = line.partition(":")
        needs[path] = rest.split()
        by_name[posixpath.basename(path).removesuffix(".ko").replace("-", "_")] = path
    wanted: set[str] = set()
    pending = [by_name[name] for name in names if name in by_name]
    while pending:
        path = pending.pop()
        if path not in wanted:
            wanted.add(path)
            pending.extend(needs[path])
    return wanted


def _merged(name: str) -> str:
    """The path of a tar member in a tree whose bin, sbin and lib directories live under usr."""
    path = posixpath.normpath(name.lstrip("./") or ".")
    return f"usr/{path}" if path.split("/")[0] in _MERGED else path


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return (file or io.BytesIO()).read()


def _copy(tar: tarfile.TarFile, member: tarfile.TarInfo, path: str, cpio: CpioWriter) -> None:
    if member.isdir():
        cpio.directory(path)
    elif member.issym():
        cpio.symlink(path, _merged_target(path, member.linkname))
    elif member.islnk():
        cpio.symlink(path, "/" + _merged(member.linkname))
    elif member.isfile():
        data = _content(tar, member)
        cpio.file(path, data, member.mode & 0o777)
        if path.endswith(".py"):
            add_bytecode(cpio, path, data)


def _merged_target(path: str, target: str) -> str:
    """Relative links may climb out of a directory that is now one level deeper; absolute ones always lead right."""
    if target.startswith("/") or "/" not in target:
        return target
    original_parent = posixpath.dirname(path)
    resolved = posixpath.normpath(posixpath.join(original_parent, target))
    return "/" + _merged(resolved)
