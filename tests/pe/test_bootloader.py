"""The default boot entry of several distributions' boot loaders."""

from __future__ import annotations

from pathlib import Path

import pytest

from standby.pe.bootloader import BootEntry, default_entry
from standby.pe.errors import SystemNotFound
from standby.pe.filesystems import Filesystem
from standby.pe.system import MountedSystem, Placed, resolve
from tests.pe.tree import GRUB, RELEASE, ROOT_UUID


def system_at(root: Path) -> MountedSystem:
    device = Path("/dev/none")
    return MountedSystem(root, Filesystem(device, "ext4", ROOT_UUID, ""), Placed(device), None, None, [])


def put(root: Path, **files: str) -> MountedSystem:
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_DOT_", ".").replace("_DASH_", "-")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return system_at(root)


def test_debian(tmp_path: Path) -> None:
    system = put(tmp_path, boot__grub__grub_DOT_cfg=GRUB)
    for name in ("vmlinuz", "initrd.img"):
        (tmp_path / f"boot/{name}-{RELEASE}").touch()
    assert default_entry(system) == BootEntry(
        f"boot/vmlinuz-{RELEASE}",
        f"boot/initrd.img-{RELEASE}",
        f"root=UUID={ROOT_UUID} ro console=ttyS0 cgroup_enable=memory",
    )


@pytest.mark.parametrize("default", ["1>0", "gnulinux-advanced>gnulinux-old", "Advanced options>0", "1"])
def test_a_chosen_entry_of_a_submenu(tmp_path: Path, default: str) -> None:
    system = put(tmp_path, boot__grub__grub_DOT_cfg=GRUB.replace('default="0"', f'default="{default}"'))
    for name in ("vmlinuz-old", "initrd.img-old"):
        (tmp_path / "boot" / name).touch()
    assert default_entry(system) == BootEntry("boot/vmlinuz-old", "boot/initrd.img-old", f"root=UUID={ROOT_UUID} ro")


def test_the_saved_entry_counts(tmp_path: Path) -> None:
    text = GRUB.replace('default="0"', 'default="${saved_entry}"')
    system = put(
        tmp_path,
        boot__grub__grub_DOT_cfg=text,
        boot__grub__grubenv="# GRUB Environment Block\nsaved_entry=gnulinux-advanced>gnulinux-old\n####\n",
    )
    (tmp_path / "boot/vmlinuz-old").touch()
    assert default_entry(system).kernel == "boot/vmlinuz-old"


def test_a_boot_file_system_of_its_own(tmp_path: Path) -> None:
    system = put(
        tmp_path, boot__grub__grub_DOT_cfg=GRUB.replace("/boot/vmlinuz", "/vmlinuz").replace("/boot/in", "/in")
    )
    (tmp_path / f"boot/vmlinuz-{RELEASE}").touch()
    entry = default_entry(system)
    assert (entry.kernel, entry.initrd) == (f"boot/vmlinuz-{RELEASE}", f"boot/initrd.img-{RELEASE}")


def test_boot_loader_specification(tmp_path: Path) -> None:
    directory = tmp_path / "boot/loader/entries"
    directory.mkdir(parents=True)
    for release in ("5.14.0-9.el9", "5.14.0-70.el9"):
        (directory / f"abc-{release}.conf").write_text(
            f"title Rocky\nlinux /vmlinuz-{release}\n"
            f"initrd /initramfs-{release}.img $tuned\noptions $kernelopts quiet\n"
        )
        (tmp_path / f"boot/vmlinuz-{release}").touch()
    (tmp_path / "boot/grub2").mkdir()
    (tmp_path / "boot/grub2/grubenv").write_text("kernelopts=root=/dev/mapper/rl-root ro\n")
    assert default_entry(system_at(tmp_path)) == BootEntry(
        "boot/vmlinuz-5.14.0-70.el9", "boot/initramfs-5.14.0-70.el9.img", "root=/dev/mapper/rl-root ro quiet"
    )


def test_without_a_boot_loader_the_newest_kernel(tmp_path: Path) -> None:
    (tmp_path / "boot").mkdir()
    for name in ("vmlinuz-6.1.0-9", "vmlinuz-6.1.0-10", "initrd.img-6.1.0-10"):
        (tmp_path / "boot" / name).touch()
    entry = default_entry(system_at(tmp_path))
    assert (entry.kernel, entry.initrd) == ("boot/vmlinuz-6.1.0-10", "boot/initrd.img-6.1.0-10")


def test_no_kernel_at_all(tmp_path: Path) -> None:
    (tmp_path / "boot").mkdir()
    with pytest.raises(SystemNotFound):
        default_entry(system_at(tmp_path))


def test_links_of_the_replicated_system_do_not_lead_out_of_it(tmp_path: Path) -> None:
    (tmp_path / "usr/lib").mkdir(parents=True)
    (tmp_path / "lib").symlink_to("/usr/lib")
    (tmp_path / "escape").symlink_to("../../../../etc")
    assert resolve(tmp_path, "lib/modules") == tmp_path / "usr/lib/modules"
    assert resolve(tmp_path, "escape/passwd") == tmp_path / "etc/passwd"
    (tmp_path / "ring").symlink_to("ring")
    with pytest.raises(OSError, match="ring"):
        resolve(tmp_path, "ring")
