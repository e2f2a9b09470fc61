"""Which devices are protected, which are refused, and with which remedy."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cdp.agent.capture import errors
from cdp.agent.capture.devices import (
    Device,
    check_group,
    check_protectable,
    disks_under,
    from_sysfs,
    inspect,
)
from journal.errors import CdpError
from tests.capture.sysfs import FakeSysfs

GIB = 1 << 30


@pytest.fixture
def sysfs(tmp_path: Path) -> FakeSysfs:
    return FakeSysfs(tmp_path / "sys")


def device(sysfs: FakeSysfs, major: int, minor: int) -> Device:
    return from_sysfs(sysfs.root, major, minor, Path(f"/dev/test-{major}-{minor}"))


def check(sysfs: FakeSysfs, major: int, minor: int, proc: Path = Path("/nonexistent")) -> None:
    check_protectable(device(sysfs, major, minor), sysfs.root, proc)


def test_an_ordinary_disk_is_protectable(sysfs: FakeSysfs) -> None:
    disk = sysfs.disk("vda", "254:0", serial="S1", queue__rotational="0", queue__zoned="none", diskseq="9")
    sysfs.partition(disk, "vda1", "254:1", 2048)
    check(sysfs, 254, 0)
    found = device(sysfs, 254, 0)
    assert (found.name, found.size_bytes, found.sector_bytes, found.serial) == ("vda", 131072 * 512, 512, "S1")
    assert (found.rotational, found.diskseq, found.partition_of) == (False, 9, None)


def test_a_partition_names_its_disk(sysfs: FakeSysfs) -> None:
    disk = sysfs.disk("nvme0n1", "259:0")
    sysfs.partition(disk, "nvme0n1p2", "259:2", 4096)
    found = device(sysfs, 259, 2)
    assert (found.partition_of, found.start_bytes) == ("nvme0n1", 4096 * 512)
    with pytest.raises(errors.DeviceIsPartition, match="/dev/nvme0n1:"):
        check(sysfs, 259, 2)


@pytest.mark.parametrize(
    ("files", "error"),
    [
        ({"queue__zoned": "host-managed"}, errors.DeviceZoned),
        ({"queue__dax": "1"}, errors.DeviceDax),
        ({"queue__crypto__modes": "AES-256-XTS"}, errors.DeviceInlineEncrypted),
        ({"ro": "1"}, errors.DeviceReadOnly),
        ({"size": "0"}, errors.DeviceOutOfLimits),
        ({"size": str(2**51 // 512)}, errors.DeviceOutOfLimits),
        ({"queue__logical_block_size": "16384"}, errors.DeviceOutOfLimits),
    ],
)
def test_refusals(sysfs: FakeSysfs, files: dict[str, str], error: type[CdpError]) -> None:
    sysfs.disk("sda", "8:0", **files)
    with pytest.raises(error) as refused:
        check(sysfs, 8, 0)
    assert refused.value.remedy


@pytest.mark.parametrize(
    ("holder", "uuid", "refused"),
    [
        ("dm-0", "LVM-abc", False),
        ("dm-1", "CRYPT-LUKS2-abc", False),
        ("dm-2", "mpath-3600", True),
        ("md127", "", True),
        ("bcache0", "", True),
    ],
)
@pytest.mark.parametrize("on_partition", [False, True])
def test_holders(sysfs: FakeSysfs, holder: str, uuid: str, refused: bool, on_partition: bool) -> None:
    disk = sysfs.disk("sda", "8:0")
    below = sysfs.partition(disk, "sda1", "8:1", 2048) if on_partition else disk
    above = sysfs.disk(holder, "253:7", **({"dm__uuid": uuid} if uuid else {}))
    sysfs.stack(below, above)
    if refused:
        with pytest.raises(errors.DeviceIsMember, match=f"/dev/{holder}"):
            check(sysfs, 8, 0)
    else:
        check(sysfs, 8, 0)
    check(sysfs, 253, 7)
    assert disks_under(253, 7, sysfs.root) == {(253, 7), (8, 0)}


def test_a_group_has_no_disk_on_top_of_another(sysfs: FakeSysfs) -> None:
    disk, other = sysfs.disk("sda", "8:0"), sysfs.disk("dm-0", "253:0", dm__uuid="LVM-1")
    sysfs.stack(disk, other)
    with pytest.raises(errors.DeviceIsMember):
        check_group([device(sysfs, 8, 0), device(sysfs, 253, 0)], sysfs.root)
    with pytest.raises(errors.DeviceIsMember):
        check_group([device(sysfs, 8, 0)] * 2, sysfs.root)
    with pytest.raises(errors.DeviceOutOfLimits):
        check_group([], sysfs.root)
    check_group([device(sysfs, 8, 0)], sysfs.root)


def test_swap_in_a_file_on_the_disk(sysfs: FakeSysfs, tmp_path: Path) -> None:
    swap = tmp_path / "swap file"
    swap.touch()
    number = swap.stat().st_dev
    disk = sysfs.disk("sda", "8:0")
    sysfs.partition(disk, "sda1", f"{os.major(number)}:{os.minor(number)}", 2048)
    proc = tmp_path / "proc"
    proc.mkdir()
    escaped = str(swap).replace(" ", "\\040")
    (proc / "swaps").write_text(f"Filename Type Size Used Priority\n{escaped} file 1024 0 -2\n")
    with pytest.raises(errors.DeviceHasSwap, match="swapoff"):
        check(sysfs, 8, 0, proc)


def test_paths_that_are_no_devices(tmp_path: Path) -> None:
    with pytest.raises(errors.DeviceMissing, match="lsblk"):
        inspect(tmp_path / "nothing")
    with pytest.raises(errors.NotABlockDevice, match="losetup"):
        inspect(tmp_path)
    with pytest.raises(errors.NotABlockDevice):
        inspect("/dev/null")


@pytest.mark.parametrize(
    ("size_bytes", "granule_bytes"),
    [(512, 64 << 10), (64 * GIB, 64 << 10), (64 * GIB + 512, 128 << 10), (1 << 40, 1 << 20), (1 << 50, 1 << 30)],
)
def test_granules(sysfs: FakeSysfs, size_bytes: int, granule_bytes: int) -> None:
    sysfs.disk("sda", "8:0", size=str(size_bytes // 512))
    found = device(sysfs, 8, 0)
    assert found.granule_bytes == granule_bytes
    assert 1 <= found.granules <= 1 << 20
    assert found.granules * granule_bytes >= size_bytes
