"""What is written into the replicated system before its first start here. Everything written is told.

Nothing is installed and nothing of the user's is deleted: files are added, or edited in the way that a person moving
the machine to this hypervisor would edit them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from typing import Final

import msgspec

from journal.wire import DiskInfo
from standby.pe import netconfig
from standby.pe.initrd import Nic
from standby.pe.modules import VIRTIO
from standby.pe.system import MountedSystem

_FOREIGN_TOOLS: Final = (
    "open-vm-tools",
    "vmtoolsd",
    "vgauth",
    "vmware-tools",
    "vboxadd",
    "vboxadd-service",
    "virtualbox-guest-utils",
    "vboxservice",
    "hv-kvp-daemon",
    "hv-vss-daemon",
    "hv-fcopy-daemon",
    "hypervkvpd",
    "hypervvssd",
    "hypervfcopyd",
    "walinuxagent",
    "waagent",
    "xe-daemon",
    "xe-linux-distribution",
    "xenstored",
    "prltoolsd",
)
"""Guest tools of other platforms: on this one they fail, wait for their host, or set its clock and addresses."""
_UNIT_DIRECTORIES: Final = ("etc/systemd/system", "usr/lib/systemd/system", "lib/systemd/system", "etc/init.d")
_REBUILD_DELAY: Final = "10min"
"""The rebuild of the initramfs takes a minute of CPU and more: not while services start."""
_REBUILD: Final = """\
#!/bin/sh
# Written by a takeover. The first start on this hypervisor used an initramfs that was made for it elsewhere; before
# the next one, the system's own has to hold the virtio drivers as well.
set -eu
release=$(uname -r)
if command -v update-initramfs >/dev/null; then
    image=/boot/initrd.img-$release
    lsinitramfs "$image" | grep -q '/virtio_blk\\.ko' || update-initramfs -u -k "$release"
elif command -v dracut >/dev/null; then
    image=/boot/initramfs-$release.img
    lsinitrd "$image" | grep -q '/virtio_blk\\.ko' || dracut --force --add-drivers "virtio_pci virtio_blk virtio_net" \\
        "$image" "$release"
fi
systemctl disable cdp-rebuild-initramfs.timer
"""
_REBUILD_SERVICE: Final = """\
[Unit]
Description=Put the drivers of this hypervisor into the initramfs (after a takeover)

[Service]
Type=oneshot
ExecStart=/bin/sh /etc/cdp/rebuild-initramfs
Nice=19
IOSchedulingClass=idle
"""
_REBUILD_TIMER: Final = f"""\
[Unit]
Description=Put the drivers of this hypervisor into the initramfs, once the system has settled

[Timer]
OnBootSec={_REBUILD_DELAY}

[Install]
WantedBy=timers.target
"""


class InjectStandby(msgspec.Struct, kw_only=True, frozen=True):
    management_address: str
    gateway: str | None = None


class InjectSpec(msgspec.Struct, kw_only=True, frozen=True):
    """What the injection reads of a machine's specification; the rest of it is ignored."""

    name: str = ""
    service_addresses: tuple[str, ...] = ()
    standby: InjectStandby | None = None
    disks: tuple[DiskInfo, ...] = ()


def hosts(addresses: Iterable[str]) -> frozenset[str]:
    """The addresses without their prefixes."""
    return frozenset(address.partition("/")[0] for address in addresses)


def inject(system: MountedSystem, spec: InjectSpec, *, takeover: str, server: str, nic: Nic | None) -> list[str]:
    """Change the system, which is mounted for writing; what was changed. May be repeated. Raises ``OSError``."""
    done: list[str] = []
    if nic is not None:
        done += _name_card(system, nic)
    if spec.standby is not None:
        mac = nic.mac if nic else ""
        done += netconfig.adapt(
            system.root, hosts(spec.service_addresses), spec.standby.management_address, spec.standby.gateway, mac
        )
    done += _retire_persistent_names(system)
    done += _fstab_by_uuid(system, spec.disks)
    done += _mask_foreign_tools(system)
    done += _rebuild_later(system)
    # Last: its presence says to the replicated agent that it was taken over, so everything before it is there.
    text = json.dumps({"takeover": takeover, "server": server}) + "\n"
    done += _write(system, "etc/cdp/takeover.json", text)
    return done


def _name_card(system: MountedSystem, nic: Nic) -> list[str]:
    return _write(
        system,
        f"etc/systemd/network/10-cdp-{nic.name}.link",
        f"# Written by a takeover: the card that the configuration calls {nic.name} is this one now.\n"
        f"[Match]\nMACAddress={nic.mac}\n\n[Link]\nName={nic.name}\n",
    )


def _retire_persistent_names(system: MountedSystem) -> list[str]:
    """Rules of old systems that give the name away to the old card's MAC."""
    done = []
    for path in sorted(system.path("etc/udev/rules.d").glob("*-persistent-net.rules")):
        path.rename(path.with_name(path.name + ".before-takeover"))
        done.append(f"/{path.relative_to(system.root)} set aside")
    return done


def _fstab_by_uuid(system: MountedSystem, disks: tuple[DiskInfo, ...]) -> list[str]:
    """Devices by the names of the old platform (/dev/sda1) are called by the UUID of what is on them."""
    order = {disk.name.rsplit("/", 1)[-1]: position for position, disk in enumerate(sorted(disks, key=_index))}
    names: dict[str, str] = {}
    for place in system.volumes:
        filesystem = system.filesystems.get(place.device)
        if filesystem is None or place.partition is None or place.disk is None:
            continue
        for name, position in order.items():
            if position == place.disk:
                separator = "p" if name[-1:].isdigit() else ""
                number = f"{separator}{place.partition.number}" if place.partition.number else ""
                names[f"/dev/{name}{number}"] = filesystem.uuid
    path = system.path("etc/fstab")
    text = path.read_text(errors="surrogateescape")
    new = re.sub(r"^(/dev/\S+)", lambda match: _by_uuid(match[1], names), text, flags=re.MULTILINE)
    return _write(system, "etc/fstab", new) if new != text else []


def _by_uuid(device: str, names: dict[str, str]) -> str:
    return f"UUID={names[device]}" if device in names else device


def _index(disk: DiskInfo) -> int:
    return disk.index


def _mask_foreign_tools(system: MountedSystem) -> list[str]:
    done = []
    there: set[str] = set()
    for where in _UNIT_DIRECTORIES:
        directory = system.path(where)
        if directory.is_dir():
            there.update(entry.name for entry in directory.iterdir())
    for tool in _FOREIGN_TOOLS:
        if there.isdisjoint((f"{tool}.service", tool)):
            continue
        mask = system.path("etc/systemd/system") / f"{tool}.service"
        if mask.is_symlink():
            mask.unlink()
        elif mask.exists():
            mask.rename(mask.with_name(mask.name + ".before-takeover"))
        mask.parent.mkdir(parents=True, exist_ok=True)
        mask.symlink_to("/dev/null")
        done.append(f"{tool}.service masked: it belongs to the old platform")
    return done


def _rebuild_later(system: MountedSystem) -> list[str]:
    done = _write(system, "etc/cdp/rebuild-initramfs", _REBUILD)
    done += _write(system, "etc/systemd/system/cdp-rebuild-initramfs.service", _REBUILD_SERVICE)
    done += _write(system, "etc/systemd/system/cdp-rebuild-initramfs.timer", _REBUILD_TIMER)
    enabled = system.path("etc/systemd/system/timers.target.wants") / "cdp-rebuild-initramfs.timer"
    enabled.parent.mkdir(parents=True, exist_ok=True)
    if not enabled.is_symlink():
        enabled.symlink_to("../cdp-rebuild-initramfs.timer")
    if system.path("etc/initramfs-tools/modules").is_file():
        path = system.path("etc/initramfs-tools/modules")
        text = path.read_text()
        missing = [name for name in VIRTIO if not re.search(rf"^{name}\b", text, re.MULTILINE)]
        if missing:
            done += _write(system, "etc/initramfs-tools/modules", text.rstrip("\n") + "\n" + "\n".join(missing) + "\n")
    if system.path("etc/dracut.conf.d").is_dir():
        drivers = f'add_drivers+=" {" ".join(VIRTIO)} "\n'
        done += _write(system, "etc/dracut.conf.d/90-cdp-virtio.conf", drivers)
    return done


def _write(system: MountedSystem, inside: str, text: str) -> list[str]:
    """Whole or not at all: a power cut in the middle must not leave half a file."""
    directory, _, name = inside.rpartition("/")
    parent = system.path(directory)
    parent.mkdir(parents=True, exist_ok=True)
    path = parent / name
    if path.is_symlink():
        path = system.path(inside)
    partial = path.with_name(f".{path.name}.cdp")
    partial.write_text(text, errors="surrogateescape")
    if path.exists():
        before = path.stat()
        partial.chmod(before.st_mode & 0o7777)
        os.chown(partial, before.st_uid, before.st_gid)
    partial.rename(path)
    return [f"/{inside}"]
