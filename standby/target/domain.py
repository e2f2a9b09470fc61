"""The standby's domain on its hypervisor: define, start, power off, remove; boot from PE or disk.

    define_pe ─► start ─► (the PE follows) ─► takeover: kexec ─► redefine_for_disk ─► reboot: RebootWatcher starts it
        ▲                                                             │
        └──────────────── rollback: destroy, define_pe ◄──────────────┘

Every call is idempotent and blocks; the server runs them in threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import libvirt

from standby.pe.config import PeConfig
from standby.pe.image import installed
from standby.spec import MachineSpec, SourceDomain, StandbySpec
from standby.target.boot import Boot, DiskBoot
from standby.target.config_disk import encode
from standby.target.connection import Connections, refusal, translated
from standby.target.errors import DomainMissing, DomainNameTaken, HypervisorRefused
from standby.target.volumes import Volumes
from standby.target.watch import RebootWatcher
from standby.target.xml import domain_xml, machine_of, supports_kvm

_UNDEFINE_FLAGS = libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA


class LibvirtTarget:
    """All standbys, on whatever hypervisors their specifications name.

    ``pe_directory`` is where ``cdp pe build`` put the image; it is looked up at each definition, so that a new image
    is used from the next one on. All methods raise ``HypervisorUnreachable`` (transient) and ``HypervisorRefused``.
    """

    def __init__(self, pe_directory: Path) -> None:
        self._pe_directory = pe_directory
        self._watcher = RebootWatcher()
        self._connections = Connections(on_open=self._watcher.attach)
        self._define_lock = threading.Lock()

    def close(self) -> None:
        self._connections.close()
        self._watcher.close()

    @translated
    def state(self, spec: MachineSpec) -> str:
        """``running``, ``off`` or ``absent``."""
        domain = self._find(spec)
        if domain is None:
            return "absent"
        return "running" if domain.isActive() else "off"

    @translated
    def define_pe(self, spec: MachineSpec, config: PeConfig) -> None:
        """Create what is missing and define the domain to boot the PE. It must be off.

        Raises ``PeImageMissing``, ``DomainNameTaken``, ``TargetStorageFull``, ``TargetDiskMismatch``.
        """
        image = installed(self._pe_directory)
        with self._define_lock:
            volumes = self._volumes(spec)
            volumes.create_disks()
            volumes.write_config(encode(config))
            self._define(spec, volumes, volumes.upload_image(image))

    @translated
    def redefine_for_disk(self, spec: MachineSpec) -> None:
        """From its next start on the domain boots from its disk. A running one is not touched, but ends when its guest
        resets, and is then started again."""
        self._require(spec)
        self._define(spec, self._volumes(spec), DiskBoot())

    @translated
    def start(self, spec: MachineSpec) -> None:
        """Start what is defined. Raises ``DomainMissing``."""
        domain = self._require(spec)
        if not domain.isActive():
            try:
                domain.create()
            except libvirt.libvirtError as error:
                if error.get_error_code() != libvirt.VIR_ERR_OPERATION_INVALID or not domain.isActive():
                    raise

    @translated
    def destroy(self, spec: MachineSpec) -> None:
        """Power off, at once. A domain that is off, or absent, is fine."""
        domain = self._find(spec)
        if domain is not None:
            self._watcher.expect_end(domain.UUIDString())
            _power_off(domain)

    @translated
    def remove(self, spec: MachineSpec) -> None:
        """Power off, undefine and delete the disks."""
        self.destroy(spec)
        domain = self._find(spec)
        if domain is not None:
            domain.undefineFlags(
                libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
            )
        self._volumes(spec).delete()

    @translated
    def destroy_source(self, source: SourceDomain) -> None:
        """Fence a source that is a libvirt domain. Raises ``DomainMissing``: it may run elsewhere."""
        connection = self._connections.get(source.hypervisor)
        try:
            domain = connection.lookupByName(source.domain)
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                raise DomainMissing(
                    f"There is no domain {source.domain!r} at {source.hypervisor}.",
                    remedy="Correct the source domain in the machine's specification.",
                    domain=source.domain,
                ) from error
            raise
        _power_off(domain)
        if _active(domain):
            raise HypervisorRefused(
                f"The source's domain {source.domain!r} is still running.",
                remedy="Power the source off by other means.",
                domain=source.domain,
            )

    def _define(self, spec: MachineSpec, volumes: Volumes, boot: Boot) -> None:
        connection = self._connection(spec)
        standby = _standby(spec)
        kvm = supports_kvm(connection.getCapabilities())
        held = self._named(connection, spec.domain_name)
        if held is not None and machine_of(held.XMLDesc()) != spec.machine:
            raise DomainNameTaken(
                f"The hypervisor has a domain {spec.domain_name!r} that is not the standby of this machine.",
                remedy="Rename or remove that domain, or give the machine another name.",
                domain=spec.domain_name,
            )
        connection.defineXML(domain_xml(spec, standby, boot, volumes.files(), kvm=kvm))

    def _find(self, spec: MachineSpec) -> libvirt.virDomain | None:
        return _or_none(lambda: self._connection(spec).lookupByUUIDString(str(spec.domain_uuid)))

    @staticmethod
    def _named(connection: libvirt.virConnect, name: str) -> libvirt.virDomain | None:
        return _or_none(lambda: connection.lookupByName(name))

    def _require(self, spec: MachineSpec) -> libvirt.virDomain:
        domain = self._find(spec)
        if domain is None:
            raise DomainMissing(
                f"The standby of {spec.name!r} is not defined on its hypervisor.",
                remedy=f"Run 'cdp standby define {spec.name}'.",
                domain=spec.domain_name,
            )
        return domain

    def _connection(self, spec: MachineSpec) -> libvirt.virConnect:
        return self._connections.get(_standby(spec).hypervisor)

    def _volumes(self, spec: MachineSpec) -> Volumes:
        return Volumes(self._connection(spec), spec, _standby(spec))


def _standby(spec: MachineSpec) -> StandbySpec:
    if spec.standby is None:
        raise DomainMissing(
            f"{spec.name!r} has no standby.", remedy="Name a hypervisor: 'cdp protect NAME --hypervisor URI ...'."
        )
    return spec.standby


def _power_off(domain: libvirt.virDomain) -> None:
    try:
        if _active(domain):
            domain.destroy()
    except libvirt.libvirtError as error:
        # It ended by itself between the question and the act.
        if _active(domain):
            raise refusal(error) from error


def _active(domain: libvirt.virDomain) -> bool:
    """A transient domain is gone for libvirt once it has ended."""
    try:
        return bool(domain.isActive())
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            return False
        raise


def _or_none(look_up: Callable[[], libvirt.virDomain]) -> libvirt.virDomain | None:
    try:
        return look_up()
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            return None
        raise
