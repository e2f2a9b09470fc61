"""The hypervisor side against a real libvirtd, in namespaces of its own, and the real PE."""

from __future__ import annotations

import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import libvirt
import msgspec
import pytest

from deploy.lab import hypervisor, network
from deploy.lab.layout import BRIDGE, Layout
from deploy.lab.programs import Processes
from journal.wire import DiskInfo
from standby.pe import image
from standby.spec import MachineSpec, SourceDomain, StandbySpec
from standby.target.config_disk import PeConfig, config_of
from standby.target.domain import LibvirtTarget
from standby.target.errors import (
    DomainMissing,
    DomainNameTaken,
    HypervisorRefused,
    HypervisorUnreachable,
    TargetDiskMismatch,
    TargetStorageFull,
)
from tests.harness.wait import wait_until

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]

DISK_BYTES = 64 << 20


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Layout]:
    where = Layout(f"cdpt{uuid.uuid4().hex[:6]}", Path("/var/tmp") / f"cdpt-{uuid.uuid4().hex[:6]}")
    where.logs.mkdir(parents=True)
    processes = Processes(where.root / "processes.json", where.logs)
    try:
        network.up(where)
        hypervisor.start(where, processes)
        yield where
    finally:
        processes.stop_all()
        network.down(where)
        subprocess.run(["rm", "-r", str(where.root)], check=True)


@pytest.fixture(scope="module")
def pe_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pe")
    image.install(image.build(progress=print), directory)
    return directory


@pytest.fixture
def target(pe_directory: Path) -> Iterator[LibvirtTarget]:
    held = LibvirtTarget(pe_directory)
    yield held
    held.close()


@pytest.fixture
def spec(lab: Layout, target: LibvirtTarget) -> Iterator[MachineSpec]:
    made = MachineSpec(
        machine=str(uuid.uuid4()),
        name=f"m{uuid.uuid4().hex[:6]}",
        disks=(DiskInfo(index=0, name="/dev/vda", size_bytes=DISK_BYTES, serial="root"),),
        standby=StandbySpec(
            hypervisor=lab.hypervisor_uri,
            bridge=BRIDGE,
            management_address="10.77.0.20/24",
            storage_dir=str(lab.standby_dir),
            memory_bytes=640 << 20,
        ),
    )
    yield made
    target.remove(made)


def changed(spec: MachineSpec, **standby: object) -> MachineSpec:
    assert spec.standby is not None
    return msgspec.structs.replace(spec, standby=msgspec.structs.replace(spec.standby, **standby))


def config(spec: MachineSpec) -> PeConfig:
    assert spec.standby is not None
    return config_of(spec, spec.standby, server="https://10.77.0.2:7443", ca_pem="-", credential="c", secret="s")


def console(lab: Layout, spec: MachineSpec) -> str:
    path = lab.standby_dir / f"{spec.name}-console.log"
    return path.read_text(errors="replace") if path.exists() else ""


def test_the_pe_boots_finds_its_disks_and_a_reset_leads_to_the_disk(
    lab: Layout, target: LibvirtTarget, spec: MachineSpec
) -> None:
    assert target.state(spec) == "absent"
    target.define_pe(spec, config(spec))
    target.define_pe(spec, config(spec))
    assert target.state(spec) == "off"
    assert (lab.standby_dir / f"{spec.name}-disk0.raw").stat().st_size == DISK_BYTES
    target.start(spec)
    target.start(spec)
    assert target.state(spec) == "running"
    # It has read its configuration disk: it says to whom it belongs.
    wait_until(lambda: "server https://10.77.0.2:7443" in console(lab, spec), 240, "the PE's start")

    target.redefine_for_disk(spec)
    assert target.state(spec) == "running"
    connection = libvirt.open(lab.hypervisor_uri)
    # A domain object keeps the number that the domain had when it was looked up.
    first = connection.lookupByUUIDString(str(spec.domain_uuid))
    first.reset()

    def runs_anew() -> bool:
        now = connection.lookupByUUIDString(str(spec.domain_uuid))
        return bool(now.isActive()) and now.ID() != first.ID()

    wait_until(runs_anew, 60, "the start from the disk")
    assert "<kernel>" not in first.XMLDesc()
    target.destroy(spec)
    target.destroy(spec)
    assert target.state(spec) == "off"
    connection.close()


def test_an_end_that_is_no_reset_is_left_alone(lab: Layout, target: LibvirtTarget, spec: MachineSpec) -> None:
    target.define_pe(spec, config(spec))
    target.start(spec)
    target.redefine_for_disk(spec)
    connection = libvirt.open(lab.hypervisor_uri)
    domain = connection.lookupByUUIDString(str(spec.domain_uuid))
    domain.destroy()
    # What it would react to has been delivered when this connection's own later event has.
    target.start(spec)
    target.destroy(spec)
    assert target.state(spec) == "off"
    connection.close()


def test_removing_deletes_the_disks(lab: Layout, target: LibvirtTarget, spec: MachineSpec) -> None:
    target.define_pe(spec, config(spec))
    target.remove(spec)
    target.remove(spec)
    assert target.state(spec) == "absent"
    assert not list(lab.standby_dir.glob(f"{spec.name}-disk*"))
    assert not list(lab.standby_dir.glob(f"{spec.name}-config*"))


def test_a_hypervisor_that_does_not_answer(target: LibvirtTarget, spec: MachineSpec) -> None:
    away = changed(spec, hypervisor="qemu+unix:///system?socket=/nonexistent")
    with pytest.raises(HypervisorUnreachable, match="does not answer") as caught:
        target.state(away)
    assert caught.value.transient
    assert caught.value.remedy


def test_no_pe_image(lab: Layout, spec: MachineSpec, tmp_path: Path) -> None:
    empty = LibvirtTarget(tmp_path)
    try:
        with pytest.raises(image.PeImageMissing, match="no PE image"):
            empty.define_pe(spec, config(spec))
    finally:
        empty.close()


def test_too_little_room_for_the_disks(target: LibvirtTarget, spec: MachineSpec, lab: Layout) -> None:
    huge = msgspec.structs.replace(spec, disks=(DiskInfo(index=0, name="/dev/vda", size_bytes=1 << 50),))
    with pytest.raises(TargetStorageFull, match="MiB left"):
        target.define_pe(huge, config(spec))
    assert not list(lab.standby_dir.glob(f"{spec.name}-disk*"))


def test_a_disk_of_another_size_is_not_reused(target: LibvirtTarget, spec: MachineSpec) -> None:
    target.define_pe(spec, config(spec))
    grown = msgspec.structs.replace(spec, disks=(DiskInfo(index=0, name="/dev/vda", size_bytes=DISK_BYTES * 2),))
    with pytest.raises(TargetDiskMismatch, match="has 67108864 bytes"):
        target.define_pe(grown, config(spec))


def test_a_domain_that_is_not_ours_is_not_touched(lab: Layout, target: LibvirtTarget, spec: MachineSpec) -> None:
    connection = libvirt.open(lab.hypervisor_uri)
    other = connection.defineXML(
        f"<domain type='qemu'><name>{spec.domain_name}</name><memory>65536</memory><os><type>hvm</type></os></domain>"
    )
    try:
        with pytest.raises(DomainNameTaken, match="not the standby"):
            target.define_pe(spec, config(spec))
    finally:
        other.undefine()
        connection.close()


def test_what_is_not_defined_cannot_start(target: LibvirtTarget, spec: MachineSpec) -> None:
    with pytest.raises(DomainMissing, match="not defined"):
        target.start(spec)
    with pytest.raises(DomainMissing, match="not defined"):
        target.redefine_for_disk(spec)


def test_a_bridge_that_does_not_exist_is_told_in_libvirts_words(target: LibvirtTarget, spec: MachineSpec) -> None:
    wrong = changed(spec, bridge="br-none")
    target.define_pe(wrong, config(wrong))
    with pytest.raises(HypervisorRefused, match="br-none"):
        target.start(wrong)


def test_a_source_domain_is_destroyed_or_missed(lab: Layout, target: LibvirtTarget, spec: MachineSpec) -> None:
    connection = libvirt.open(lab.hypervisor_uri)
    name = f"src{uuid.uuid4().hex[:6]}"
    source = connection.createXML(
        f"<domain type='qemu'><name>{name}</name><memory>65536</memory><os><type machine='q35'>hvm</type></os></domain>"
    )
    target.destroy_source(SourceDomain(hypervisor=lab.hypervisor_uri, domain=name))
    assert name not in [domain.name() for domain in connection.listAllDomains()]
    with pytest.raises(DomainMissing, match="no domain"):
        target.destroy_source(SourceDomain(hypervisor=lab.hypervisor_uri, domain=name))
    del source
    connection.close()
