"""Preparing and injecting, on a loop disk with a partition and ext4; only kexec itself is left to the VM tests."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from journal.extent import Extents
from journal.position import Position
from journal.wire import DiskInfo
from standby.pe import mounts
from standby.pe.boot import ReplicatedSystem
from standby.pe.errors import SystemNotFound
from standby.pe.injection import InjectSpec, InjectStandby
from standby.pe.kernel import Kernel
from standby.pe.partitions import expose
from tests.harness.process import run
from tests.harness.wait import wait_until_async
from tests.journal.segments import MACHINE
from tests.pe.tree import DISK_BYTES, RELEASE, ROOT_UUID, bzimage, make_disk, make_tree

pytestmark = pytest.mark.real
MAC = "52:54:00:00:00:01"
ANYWHERE = Position.genesis(MACHINE, 1, None)


@dataclass
class Recorder:
    """Takes what would be loaded. Loading a kernel into the host that runs the tests is nobody's wish."""

    loaded: list[tuple[Kernel, bytes, str]] = field(default_factory=list)

    def load(self, kernel: Kernel, initrd: bytes, command_line: str) -> None:
        self.loaded.append((kernel, initrd, command_line))

    def execute(self) -> None:
        raise AssertionError("not here")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    image = tmp_path / "disk"
    make_disk(make_tree(tmp_path / "tree"), image)
    loop = Path(run(["losetup", "--find", "--show", "--partscan", str(image)]).strip())
    try:
        yield loop
    finally:
        with suppress(OSError):
            mounts.unmount(tmp_path / "mnt", lazily=True)
        expose(loop, [])
        run(["losetup", "--detach", str(loop)])


async def addresses() -> list[str]:
    return ["10.77.0.100/24"]


def system_of(disk: Path, tmp_path: Path, recorder: Recorder) -> ReplicatedSystem:
    return ReplicatedSystem(
        {0: disk},
        mac=MAC,
        server="https://10.77.0.2:8443",
        service_addresses=addresses,
        loader=recorder,
        mount_point=tmp_path / "mnt",
    )


def spec() -> InjectSpec:
    return InjectSpec(
        name="db",
        service_addresses=("10.77.0.100/24",),
        standby=InjectStandby(management_address="10.77.0.20/24", gateway="10.77.0.1"),
    )


def change(disk: Path, tmp_path: Path, path: str, content: bytes) -> None:
    """As the source would have: through a file system, and then past this host's page cache."""
    at = tmp_path / "source"
    at.mkdir(exist_ok=True)
    mounts.mount(Path(f"{disk}p1"), at, "ext4", 0, "")
    partial = at / f"{path}.new"
    partial.write_bytes(content)
    partial.rename(at / path)
    mounts.unmount(at)


async def test_prepared_before_and_again_when_the_kernel_changed(disk: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    system = system_of(disk, tmp_path, recorder)
    ready = [system.ready]
    await system.recovery_point(ANYWHERE)
    await wait_until_async(lambda: system.ready, 20, "the preparation")
    kernel, initrd, arguments = recorder.loaded[-1]
    assert (kernel.release, kernel.unpacked) == (RELEASE, False)
    assert b"virtio_blk" in initrd
    words = arguments.split()
    assert words[:2] == [f"root=UUID={ROOT_UUID}", "rw"]
    assert "ro" not in words
    assert {"console=ttyS0", "fsck.mode=skip", "sysctl.net.ipv4.conf.all.arp_notify=1"} <= set(words)

    # A write elsewhere means nothing; one to the directory of the kernels does.
    system.applied(Extents.from_rows([(0, DISK_BYTES - 4096, 4096, 2)]))
    ready.append(system.ready)
    system.applied(Extents.from_rows([(0, 0, DISK_BYTES, 2)]))
    ready.append(system.ready)
    assert ready == [False, True, False]

    change(disk, tmp_path, f"boot/vmlinuz-{RELEASE}", bzimage(RELEASE, b"\x7fELF" + b"new" * 99))
    injected = await asyncio.to_thread(system.inject, spec(), "t1")
    assert any("prepared again" in line for line in injected)
    assert len(recorder.loaded) == 2
    assert recorder.loaded[-1][0].image != kernel.image


async def test_injected(disk: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    system = system_of(disk, tmp_path, recorder)
    await system.recovery_point(ANYWHERE)
    await wait_until_async(lambda: system.ready, 20, "the preparation")
    injected = await asyncio.to_thread(system.inject, spec(), "t1")
    assert len(recorder.loaded) == 1, "nothing had changed: nothing was loaded again"
    again = await asyncio.to_thread(system.inject, spec(), "t1")
    assert "/etc/cdp/takeover.json" in injected
    assert "/etc/cdp/takeover.json" in again

    await asyncio.to_thread(run, ["e2fsck", "-fn", f"{disk}p1"])
    at = tmp_path / "look"
    mounts.mount(Path(f"{disk}p1"), at, "ext4", mounts.MS_RDONLY, "")
    try:
        assert '"t1"' in (at / "etc/cdp/takeover.json").read_text()
        assert f"MACAddress={MAC}" in (at / "etc/systemd/network/10-cdp-ens192.link").read_text()
        interfaces = (at / "etc/network/interfaces").read_text()
        assert "10.77.0.20/24" in interfaces
        assert "10.77.0.100/24" in interfaces
        assert "10.77.0.10/24" not in interfaces
        assert (at / "etc/systemd/system/open-vm-tools.service").readlink() == Path("/dev/null")
        assert (at / "etc/systemd/system/timers.target.wants/cdp-rebuild-initramfs.timer").is_symlink()
        await asyncio.to_thread(run, ["sh", "-n", str(at / "etc/cdp/rebuild-initramfs")])
    finally:
        mounts.unmount(at)


async def test_fstab_by_uuid(disk: Path, tmp_path: Path) -> None:
    system = system_of(disk, tmp_path, Recorder())
    by_name = InjectSpec(disks=(DiskInfo(index=0, name="/dev/sda", size_bytes=DISK_BYTES),))
    await asyncio.to_thread(system.inject, by_name, "t1")
    at = tmp_path / "look"
    mounts.mount(Path(f"{disk}p1"), at, "ext4", mounts.MS_RDONLY, "")
    try:
        assert f"UUID={ROOT_UUID} / ext4" in (at / "etc/fstab").read_text()
    finally:
        mounts.unmount(at)


async def test_a_disk_without_a_system_is_told(disk: Path, tmp_path: Path) -> None:
    await asyncio.to_thread(run, ["wipefs", "--quiet", "--all", str(disk)])
    system = system_of(disk, tmp_path, Recorder())
    await system.recovery_point(ANYWHERE)
    assert isinstance(system.error, SystemNotFound)
    assert not system.ready
