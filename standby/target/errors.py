"""What can go wrong on the hypervisor, each with the way out."""

from __future__ import annotations

from journal.errors import CdpError


class HypervisorUnreachable(CdpError):
    """libvirt does not answer at the URI."""

    code = "hypervisor-unreachable"
    transient = True
    http_status = 502


class HypervisorRefused(CdpError):
    """libvirt answered, and refused; its own words are in the sentence."""

    code = "hypervisor-refused"
    http_status = 502


class DomainNameTaken(CdpError):
    """A domain of this name exists, and it is not ours."""

    code = "domain-name-taken"
    http_status = 409


class DomainMissing(CdpError):
    """The standby has not been defined on this hypervisor."""

    code = "domain-missing"
    http_status = 404


class TargetStorageFull(CdpError):
    """The storage directory has no room for full copies of the protected disks."""

    code = "target-storage-full"
    http_status = 507


class TargetDiskMismatch(CdpError):
    """A target disk exists already, with another size than the disk it shall mirror."""

    code = "target-disk-mismatch"
    http_status = 409
