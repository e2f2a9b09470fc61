"""Partition tables, kernels, modules, initrds and the configuration disk."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import tarfile
import uuid
from pathlib import Path

import pytest

from standby.pe.config import PeConfig, PeMisconfigured, device_by_serial, load
from standby.pe.errors import KexecFailed, SystemNotFound
from standby.pe.initrd import Nic, Root, appended, mini
from standby.pe.kernel import UNPACK_S_MAX, quickest, release_of
from standby.pe.modules import CHECKSUMS, VIRTIO, ModuleTree
from standby.pe.partitions import Partition, parse
from tests.pe.tree import RELEASE, ROOT_UUID, bzimage, make_tree

MIB = 1 << 20


def table_of(disk: Path, script: str) -> list[Partition]:
    with disk.open("wb") as file:
        file.truncate(64 * MIB)
    subprocess.run(["sfdisk", "--quiet", str(disk)], input=script, text=True, check=True)
    content = disk.read_bytes()
    return parse(lambda offset, length: content[offset : offset + length], len(content), 512)


def test_mbr_with_logical_partitions(tmp_path: Path) -> None:
    script = (
        "label: dos\nstart=2048,size=4096,type=83\nstart=8192,type=5\nstart=10240,size=2048\nstart=20480,size=4096\n"
    )
    assert table_of(tmp_path / "disk", script) == [
        Partition(1, MIB, 2 * MIB),
        Partition(5, 5 * MIB, MIB),
        Partition(6, 10 * MIB, 2 * MIB),
    ]


def test_gpt(tmp_path: Path) -> None:
    script = "label: gpt\nstart=1MiB,size=4MiB\nstart=8MiB,size=2MiB\n"
    assert table_of(tmp_path / "disk", script) == [Partition(1, MIB, 4 * MIB), Partition(2, 8 * MIB, 2 * MIB)]


def test_gpt_counts_in_the_disks_own_sectors() -> None:
    content = bytearray(64 * MIB)
    content[446 + 4] = 0xEE
    struct.pack_into("<II", content, 446 + 8, 1, 0xFFFFFFFF)
    content[510:512] = b"\x55\xaa"
    content[4096:4104] = b"EFI PART"
    struct.pack_into("<QII", content, 4096 + 72, 2, 128, 128)
    struct.pack_into("<16s16sQQ", content, 2 * 4096 + 128, b"type" * 4, b"uuid" * 4, 256, 511)
    found = parse(lambda offset, length: bytes(content[offset : offset + length]), len(content), 4096)
    assert found == [Partition(2, MIB, MIB)]


def test_a_table_that_points_beyond_the_disk_or_in_a_ring_is_survived(tmp_path: Path) -> None:
    assert parse(lambda _offset, length: bytes(length), 64 * MIB, 512) == []
    everywhere = bytearray(512)
    everywhere[510:512] = b"\x55\xaa"
    everywhere[446 + 4] = 0x05
    everywhere[446 + 8 : 446 + 16] = b"\x01\0\0\0\xff\xff\xff\xff"
    assert parse(lambda _offset, _length: bytes(everywhere), 64 * MIB, 512) == []


def test_kernel_release_and_form() -> None:
    image = bzimage("5.10.0-test")
    assert release_of(image) == "5.10.0-test"
    kernel = quickest(image)
    assert UNPACK_S_MAX > 0.1
    assert (kernel.unpacked, kernel.image) == (False, image)
    with pytest.raises(KexecFailed):
        release_of(b"\x7fELF" + bytes(10000))


def test_modules_come_after_what_they_need(tmp_path: Path) -> None:
    tree = ModuleTree(make_tree(tmp_path) / "usr/lib/modules" / RELEASE)
    names = [Path(path).stem for path in tree.in_order(("ext4", *VIRTIO), optional=CHECKSUMS)]
    assert len(set(names)) == len(names)
    for first, then in (("jbd2", "ext4"), ("virtio", "virtio_blk"), ("virtio_ring", "virtio_net")):
        assert names.index(first) < names.index(then)
    assert "sd_mod" not in names, "it is built in"
    with pytest.raises(SystemNotFound) as caught:
        tree.in_order(("btrfs",))
    assert caught.value.fields["module"] == "btrfs"


def contents(archive: bytes, directory: Path) -> dict[str, Path]:
    directory.mkdir()
    subprocess.run(["cpio", "--extract", "--quiet", "-d"], input=archive, cwd=directory, check=True)
    return {str(path.relative_to(directory)): path for path in directory.rglob("*")}


def test_mini_initrd(tmp_path: Path) -> None:
    modules = [("virtio.ko", b"first"), ("ext4.ko", b"second")]
    archive = mini(modules, Root(ROOT_UUID, "ext4"), Nic("52:54:00:00:00:01", "ens192"))
    files = contents(archive, tmp_path / "out")
    assert files["modules/list"].read_text().split() == ["virtio.ko", "ext4.ko"]
    assert files["modules/ext4.ko"].read_bytes() == b"second"
    assert f"root_uuid={ROOT_UUID}" in files["init"].read_text()
    subprocess.run(["busybox", "sh", "-n", str(files["init"])], check=True)
    assert files["bin/busybox"].stat().st_mode & 0o111


def test_an_appended_archive_has_no_entry_for_lib(tmp_path: Path) -> None:
    tree = ModuleTree(make_tree(tmp_path / "tree") / "usr/lib/modules" / RELEASE)
    own = b"the system's own initrd"
    whole = appended(own, tree, tree.in_order(VIRTIO))
    assert whole.startswith(own)
    at = whole.index(b"\x1f\x8b")
    assert at % 4 == 0
    archive = subprocess.run(["gzip", "-d"], input=whole[at:], capture_output=True, check=True).stdout
    listed = subprocess.run(["cpio", "-t", "--quiet"], input=archive, capture_output=True, check=True).stdout.decode()
    names = listed.splitlines()
    assert "lib" not in names
    assert f"lib/modules/{RELEASE}/modules.dep" in names
    assert f"lib/modules/{RELEASE}/kernel/drivers/block/virtio_blk.ko" in names
    assert "conf/modules" in names


def config_disk(path: Path, body: dict[str, object]) -> Path:
    data = json.dumps(body).encode()
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo("pe.json")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    return path


def good_config() -> dict[str, object]:
    return {
        "server": "https://10.77.0.2:8443",
        "ca_pem": "PEM",
        "machine": str(uuid.uuid4()),
        "credential": "id",
        "secret": "do-not-tell",
        "network": {"mac": "52:54:00:00:00:01", "address": "10.77.0.20/24", "gateway": None},
        "disks": [{"index": 0, "serial": "cdp-disk-0"}],
    }


def test_the_configuration_disk(tmp_path: Path) -> None:
    loaded = load(config_disk(tmp_path / "disk", good_config()))
    assert isinstance(loaded, PeConfig)
    assert loaded.disks[0].serial == "cdp-disk-0"


@pytest.mark.parametrize(
    "change",
    [{"server": "http://x"}, {"machine": "x"}, {"disks": []}, {"unknown": 1}, {"network": {"address": "10.0.0.1/99"}}],
)
def test_a_bad_configuration_is_refused_without_telling_the_secret(tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises(PeMisconfigured) as caught:
        load(config_disk(tmp_path / "disk", good_config() | change))
    assert "do-not-tell" not in str(caught.value)
    assert caught.value.remedy


def test_no_archive_at_all(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(4096))
    with pytest.raises(PeMisconfigured):
        load(tmp_path / "disk")


def test_disks_are_found_by_serial(tmp_path: Path) -> None:
    for name, serial in (("vda", "cdp-config"), ("vdb", "a-serial-cut-off-at-")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "serial").write_text(serial + "\n")
    assert device_by_serial("a-serial-cut-off-at-twenty", tmp_path) == Path("/dev/vdb")
    with pytest.raises(PeMisconfigured, match="cdp-config"):
        device_by_serial("missing", tmp_path)
