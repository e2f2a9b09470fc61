"""The libvirt domain of a standby, as a function of values."""

from __future__ import annotations

from dataclasses import dataclass
from xml.etree import ElementTree as ET  # only builds XML here; nothing foreign is parsed

from standby.spec import MachineSpec, StandbySpec
from standby.target.boot import Boot, DiskBoot, PeBoot
from standby.target.config_disk import SERIAL, target_serial

METADATA_NAMESPACE = "urn:cdp-standby:domain:1"
"""Marks a domain as ours, and says for which machine."""

_TCG_FEATURES = ("ssse3", "sse4.1", "sse4.2", "popcnt", "rdrand")
"""On top of qemu64: x86-64-v2 is what current numpy wheels are built for; RDRAND spares the guest the entropy wait.
``-cpu max`` would be 10 to 30 % slower under TCG."""


@dataclass(frozen=True)
class Files:
    """Paths on the hypervisor. ``disks`` are in the order of the specification's disks."""

    disks: tuple[str, ...]
    config: str
    console_log: str


def domain_xml(spec: MachineSpec, standby: StandbySpec, boot: Boot, files: Files, *, kvm: bool) -> str:
    """The domain of ``spec``: the same UUID, MAC and disks whatever it boots."""
    domain = ET.Element("domain", type="kvm" if kvm else "qemu")
    _text(domain, "name", spec.domain_name)
    _text(domain, "uuid", str(spec.domain_uuid))
    ET.register_namespace("cdp", METADATA_NAMESPACE)
    mark = ET.SubElement(ET.SubElement(domain, "metadata"), f"{{{METADATA_NAMESPACE}}}standby")
    mark.set("machine", spec.machine)
    mark.set("boot", "pe" if isinstance(boot, PeBoot) else "disk")
    _text(domain, "memory", str(standby.memory_bytes >> 10), unit="KiB")
    _text(domain, "vcpu", str(standby.vcpus))
    _boot(domain, standby, boot)
    features = ET.SubElement(domain, "features")
    ET.SubElement(features, "acpi")
    ET.SubElement(features, "apic")
    _cpu(domain, kvm=kvm)
    ET.SubElement(domain, "clock", offset="utc")
    _text(domain, "on_poweroff", "destroy")
    _text(domain, "on_reboot", "destroy" if isinstance(boot, PeBoot) else "restart")
    _text(domain, "on_crash", "destroy")
    _devices(domain, spec, standby, boot, files)
    ET.indent(domain)
    return ET.tostring(domain, encoding="unicode")


def boots_pe(xml: str) -> bool:
    """Whether a domain of ours, as libvirt describes it, starts the PE."""
    kernel = ET.fromstring(xml).find("os/kernel")  # noqa: S314  libvirt's own description
    return kernel is not None


def machine_of(xml: str) -> str | None:
    """The machine whose standby a domain is; None for a domain that is not ours."""
    mark = ET.fromstring(xml).find(f"metadata/{{{METADATA_NAMESPACE}}}standby")  # noqa: S314
    return None if mark is None else mark.get("machine")


def supports_kvm(capabilities_xml: str) -> bool:
    """Whether the hypervisor runs x86-64 guests with hardware help."""
    root = ET.fromstring(capabilities_xml)  # noqa: S314
    return any(
        domain.get("type") == "kvm"
        for arch in root.findall("guest/arch[@name='x86_64']")
        for domain in arch.iter("domain")
    )


def _boot(domain: ET.Element, standby: StandbySpec, boot: Boot) -> None:
    os = ET.SubElement(domain, "os")
    _text(os, "type", "hvm", arch="x86_64", machine=standby.machine_type)
    match boot:
        case PeBoot(kernel, initrd, arguments):
            _text(os, "kernel", kernel)
            _text(os, "initrd", initrd)
            _text(os, "cmdline", arguments)
        case DiskBoot():
            ET.SubElement(os, "boot", dev="hd")


def _cpu(domain: ET.Element, *, kvm: bool) -> None:
    if kvm:
        ET.SubElement(domain, "cpu", mode="host-passthrough", check="none")
        return
    cpu = ET.SubElement(domain, "cpu", mode="custom", match="exact", check="none")
    _text(cpu, "model", "qemu64", fallback="forbid")
    for feature in _TCG_FEATURES:
        ET.SubElement(cpu, "feature", policy="require", name=feature)
    # Otherwise the guest loads KVM, to no end.
    ET.SubElement(cpu, "feature", policy="disable", name="svm")


def _devices(domain: ET.Element, spec: MachineSpec, standby: StandbySpec, boot: Boot, files: Files) -> None:
    devices = ET.SubElement(domain, "devices")
    for number, (info, path) in enumerate(zip(spec.disks, files.disks, strict=True)):
        disk = _disk(devices, path, f"vd{_letters(number)}", target_serial(info))
        if info.sector_bytes != 512:
            size = str(info.sector_bytes)
            ET.SubElement(disk, "blockio", logical_block_size=size, physical_block_size=size)
    if isinstance(boot, PeBoot):
        # Only the PE gets to see its credential: the definition that boots from the disk has no such disk.
        disk = _disk(devices, files.config, f"vd{_letters(len(spec.disks))}", SERIAL)
        ET.SubElement(disk, "readonly")
    interface = ET.SubElement(devices, "interface", type="bridge")
    ET.SubElement(interface, "source", bridge=standby.bridge)
    ET.SubElement(interface, "mac", address=spec.mac)
    ET.SubElement(interface, "model", type="virtio")
    serial = ET.SubElement(devices, "serial", type="file")
    ET.SubElement(serial, "source", path=files.console_log, append="on")
    # Every device costs the guest time when it starts.
    ET.SubElement(devices, "controller", type="usb", model="none")
    rng = ET.SubElement(devices, "rng", model="virtio")
    _text(rng, "backend", "/dev/urandom", model="random")
    ET.SubElement(devices, "memballoon", model="none")


def _disk(devices: ET.Element, path: str, device: str, serial: str) -> ET.Element:
    disk = ET.SubElement(devices, "disk", type="file", device="disk")
    # cache=none: what the guest has flushed is on the hypervisor's disk, and the page cache is not filled twice.
    ET.SubElement(disk, "driver", name="qemu", type="raw", cache="none", discard="unmap", detect_zeroes="off")
    ET.SubElement(disk, "source", file=path)
    ET.SubElement(disk, "target", dev=device, bus="virtio")
    _text(disk, "serial", serial)
    return disk


def _text(parent: ET.Element, tag: str, text: str, **attributes: str) -> None:
    ET.SubElement(parent, tag, attributes).text = text


def _letters(number: int) -> str:
    """0, 1, .. 25, 26 -> a, b, .. z, aa: the way the kernel counts disks."""
    text = ""
    number += 1
    while number:
        number, digit = divmod(number - 1, 26)
        text = chr(ord("a") + digit) + text
    return text
