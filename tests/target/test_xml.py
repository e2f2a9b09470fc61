"""The domain's definition, as libvirt will read it."""

from __future__ import annotations

import uuid
from xml.etree import ElementTree as ET

import pytest

from journal.wire import DiskInfo
from standby.spec import MachineSpec, StandbySpec
from standby.target.boot import DiskBoot, PeBoot
from standby.target.xml import Files, boots_pe, domain_xml, machine_of, supports_kvm

STANDBY = StandbySpec(hypervisor="qemu:///system", bridge="br0", management_address="10.0.0.6/24")
SPEC = MachineSpec(
    machine=str(uuid.UUID(int=7)),
    name="db1",
    disks=(
        DiskInfo(index=0, name="/dev/sda", size_bytes=1 << 30, serial="root-1"),
        DiskInfo(index=1, name="/dev/sdb", size_bytes=1 << 31, sector_bytes=4096),
    ),
    standby=STANDBY,
)
FILES = Files(disks=("/s/db1-disk0.raw", "/s/db1-disk1.raw"), config="/s/db1-config.raw", console_log="/s/c.log")
PE = PeBoot(kernel="/s/kernel", initrd="/s/initrd", arguments="console=ttyS0")


def serials(root: ET.Element) -> list[str | None]:
    return [disk.findtext("serial") for disk in root.findall("devices/disk")]


def test_the_pe_is_booted_directly_and_ends_on_a_reset() -> None:
    xml = domain_xml(SPEC, STANDBY, PE, FILES, kvm=False)
    root = ET.fromstring(xml)
    assert root.findtext("os/kernel") == "/s/kernel"
    assert root.findtext("os/initrd") == "/s/initrd"
    assert root.findtext("on_reboot") == "destroy"
    assert serials(root) == ["root-1", "cdp-disk-1", "cdp-config"]
    assert boots_pe(xml)


def test_the_disk_is_booted_without_the_pe_and_its_credential() -> None:
    xml = domain_xml(SPEC, STANDBY, DiskBoot(), FILES, kvm=False)
    root = ET.fromstring(xml)
    assert root.find("os/kernel") is None
    assert root.findtext("on_reboot") == "restart"
    assert serials(root) == ["root-1", "cdp-disk-1"]
    assert FILES.config not in xml
    assert not boots_pe(xml)


@pytest.mark.parametrize("boot", [PE, DiskBoot()])
def test_the_domain_is_the_same_one_whatever_it_boots(boot: PeBoot | DiskBoot) -> None:
    root = ET.fromstring(domain_xml(SPEC, STANDBY, boot, FILES, kvm=False))
    assert root.findtext("name") == "cdp-db1"
    assert root.findtext("uuid") == str(SPEC.domain_uuid)
    mac = root.find("devices/interface/mac")
    assert mac is not None
    assert mac.get("address") == SPEC.mac


def test_disks_keep_their_order_and_sector_size() -> None:
    root = ET.fromstring(domain_xml(SPEC, STANDBY, PE, FILES, kvm=False))
    first, second, _ = root.findall("devices/disk")
    assert first.find("blockio") is None
    blockio = second.find("blockio")
    assert blockio is not None
    assert blockio.get("logical_block_size") == "4096"


def test_the_cpu_depends_on_what_the_hypervisor_can_do() -> None:
    emulated = ET.fromstring(domain_xml(SPEC, STANDBY, PE, FILES, kvm=False))
    assert emulated.get("type") == "qemu"
    assert emulated.findtext("cpu/model") == "qemu64"
    # numpy's wheels need x86-64-v2.
    assert "sse4.2" in {feature.get("name") for feature in emulated.findall("cpu/feature")}
    helped = ET.fromstring(domain_xml(SPEC, STANDBY, PE, FILES, kvm=True))
    assert helped.get("type") == "kvm"


def test_ours_are_told_from_others() -> None:
    assert machine_of(domain_xml(SPEC, STANDBY, PE, FILES, kvm=False)) == SPEC.machine
    assert machine_of("<domain><name>cdp-db1</name></domain>") is None


def test_kvm_is_read_from_the_capabilities() -> None:
    arch = "<capabilities><guest><arch name='x86_64'><domain type='qemu'/>{}</arch></guest></capabilities>"
    assert supports_kvm(arch.format("<domain type='kvm'/>"))
    assert not supports_kvm(arch.format(""))


def test_more_disks_than_letters() -> None:
    disks = tuple(DiskInfo(index=number, name=f"/dev/d{number}", size_bytes=1 << 20) for number in range(28))
    spec = MachineSpec(machine=SPEC.machine, name="many", disks=disks, standby=STANDBY)
    files = Files(disks=tuple(f"/s/{disk.index}" for disk in disks), config="/s/c", console_log="/s/l")
    root = ET.fromstring(domain_xml(spec, STANDBY, PE, files, kvm=False))
    names = [target.get("dev") for target in root.findall("devices/disk/target")]
    assert names[:2] == ["vda", "vdb"]
    assert names[25:] == ["vdz", "vdaa", "vdab", "vdac"]
