"""The initial file system of the replicated kernel's first start on this hypervisor.

    root on a partition    a mini initrd of our own: busybox, the drivers, twenty lines of shell; it starts seconds
                           sooner than a distribution's, because it asks nothing and waits for nothing
    LVM and others         the system's own initrd, with an archive appended that brings the virtio drivers

Both hold modules of the replicated kernel itself.
"""

from __future__ import annotations

import gzip
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from standby.pe.errors import KexecFailed
from standby.pe.modules import ModuleTree

_CPIO_S_MAX: Final = 60.0
_INDEXES: Final = (
    "modules.dep",
    "modules.dep.bin",
    "modules.alias",
    "modules.alias.bin",
    "modules.symbols",
    "modules.symbols.bin",
    "modules.softdep",
    "modules.devname",
    "modules.order",
    "modules.builtin",
    "modules.builtin.bin",
    "modules.builtin.alias.bin",
    "modules.builtin.modinfo",
)
_MASKED_AT_FIRST_START: Final = (
    "ifupdown-pre.service",
    "systemd-udev-settle.service",
    "systemd-fsck-root.service",
    "e2scrub_reap.service",
)
"""They wait for every device, check what was just checked, or tidy up. Masked in /run: gone after a reboot."""

_YIELDING_AT_FIRST_START: Final = (
    "systemd-udev-trigger.service",
    "systemd-udevd.service",
    "systemd-logind.service",
)
"""They look for devices that the service does not wait for: the root is mounted and the network card has its name. Nice
until the next reboot; the order of units stays as it is, so nothing can miss what it waits for."""

_INIT: Final = """\
#!/bin/busybox sh
# The first start of a machine that was taken over: load the drivers, mount the root, go.
bb=/bin/busybox
$bb mount -t devtmpfs -o mode=0755 devtmpfs /dev
$bb mount -t proc proc /proc
$bb mount -t sysfs sysfs /sys
$bb mount -t tmpfs -o mode=0755,nosuid,nodev tmpfs /run
exec </dev/console >/dev/console 2>&1
while read -r module; do
    $bb insmod /modules/"$module" || echo "cdp: driver $module was not loaded"
done </modules/list
if [ -n "$nic" ]; then
    for address in /sys/class/net/*/address; do
        device=${address%/address}
        device=${device##*/}
        if [ "$($bb cat "$address")" = "$mac" ] && [ "$device" != "$nic" ]; then
            $bb ip link set dev "$device" name "$nic" || echo "cdp: $device could not be called $nic"
        fi
    done
fi
$bb mkdir -p /run/systemd/system
for unit in $masked; do
    $bb ln -s /dev/null /run/systemd/system/"$unit"
done
for unit in $yielding; do
    $bb mkdir -p /run/systemd/system/"$unit".d
    printf '[Service]\\nNice=19\\n' >/run/systemd/system/"$unit".d/cdp-first-start.conf
done
tries=0
until root=$($bb findfs UUID="$root_uuid") && $bb mount -t "$root_kind" -o rw /dev/"${root#/dev/}" /root; do
    tries=$((tries + 1))
    if [ $tries -ge 100 ]; then
        echo "cdp: the root file system $root_uuid was not found"
        exec $bb sh
    fi
    $bb sleep 0.1
done
init=/sbin/init
for word in $($bb cat /proc/cmdline); do
    case "$word" in
    init=*) init=${word#init=} ;;
    esac
done
$bb umount /proc
$bb umount /sys
$bb mount -o move /dev /root/dev
$bb mount -o move /run /root/run
exec $bb switch_root /root "$init" "$@"
"""


@dataclass(frozen=True, slots=True)
class Nic:
    """The standby's network card and the name that the replicated configuration knows it by."""

    mac: str
    name: str


@dataclass(frozen=True, slots=True)
class Root:
    uuid: str
    kind: str


def mini(modules: list[tuple[str, bytes]], root: Root, nic: Nic | None) -> bytes:
    """A whole initrd. ``modules``: name and content in loading order."""
    busybox = shutil.which("busybox")
    if busybox is None:
        raise KexecFailed("There is no busybox here.", remedy="Build the PE again with 'cdp pe build'.")
    settings = {
        "nic": nic.name if nic else "",
        "mac": nic.mac if nic else "",
        "masked": " ".join(_MASKED_AT_FIRST_START),
        "yielding": " ".join(_YIELDING_AT_FIRST_START),
        "root_uuid": root.uuid,
        "root_kind": root.kind,
    }
    assignments = "".join(f"{name}={shlex.quote(value)}\n" for name, value in settings.items())
    shebang, rest = _INIT.split("\n", 1)
    with tempfile.TemporaryDirectory(prefix="initrd-") as scratch:
        tree = Path(scratch)
        for directory in ("bin", "dev", "proc", "sys", "run", "root", "modules"):
            (tree / directory).mkdir()
        shutil.copy(busybox, tree / "bin/busybox")
        (tree / "bin/busybox").chmod(0o755)
        (tree / "init").write_text(f"{shebang}\n{assignments}{rest}")
        (tree / "init").chmod(0o755)
        for name, content in modules:
            (tree / "modules" / name).write_bytes(content)
        (tree / "modules/list").write_text("".join(f"{name}\n" for name, _ in modules))
        return _archive(tree, [])


def appended(initrd: bytes, tree: ModuleTree, paths: list[str]) -> bytes:
    """The system's own ``initrd`` followed by the modules at ``paths`` and the indexes that make them loadable.

    Understood by initramfs-tools (``conf/modules``) and dracut (``etc/modules-load.d``). The directory ``lib`` itself
    is not in the archive: where it is a symbolic link, it would replace the link, and init would be gone.
    """
    names = [path.rsplit("/", 1)[-1].split(".ko", 1)[0] for path in paths]
    with tempfile.TemporaryDirectory(prefix="initrd-") as scratch:
        base = Path(scratch)
        into = base / "lib/modules" / tree.directory.name
        for path in paths:
            target = into / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((tree.directory / path).read_bytes())
        for index in _INDEXES:
            if (tree.directory / index).exists():
                (into / index).write_bytes((tree.directory / index).read_bytes())
        for directory, file in (("conf", "modules"), ("etc/modules-load.d", "cdp-virtio.conf")):
            (base / directory).mkdir(parents=True, exist_ok=True)
            (base / directory / file).write_text("".join(f"{name}\n" for name in names))
        return initrd + bytes(-len(initrd) % 4) + gzip.compress(_archive(base, ["lib", "etc"]), 1)


def _archive(tree: Path, left_out: list[str]) -> bytes:
    """A newc archive of ``tree`` without the entries of the directories ``left_out``, whose contents are kept."""
    names = sorted(str(path.relative_to(tree)) for path in tree.rglob("*"))
    wanted = "".join(f"{name}\n" for name in names if name not in left_out)
    try:
        ended = subprocess.run(
            ["cpio", "--create", "--format=newc", "--quiet", "--owner=+0:+0"],
            input=wanted.encode(),
            cwd=tree,
            capture_output=True,
            check=True,
            timeout=_CPIO_S_MAX,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise KexecFailed(
            f"The initrd cannot be written: {error}.",
            remedy="The standby may have too little memory; 512 MiB is the least for a PE.",
        ) from error
    return ended.stdout
