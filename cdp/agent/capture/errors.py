"""Why a disk, a kernel or a capture is refused. Each error carries its remedy."""

from __future__ import annotations

from journal.errors import CdpError


class DeviceMissing(CdpError):
    code = "device-missing"
    http_status = 404


class NotABlockDevice(CdpError):
    code = "not-a-block-device"
    http_status = 422


class DeviceIsPartition(CdpError):
    code = "device-is-partition"
    http_status = 422


class DeviceIsMember(CdpError):
    """A stacked device above it passes bios through unseen, or several devices share its queue."""

    code = "device-is-member"
    http_status = 422


class DeviceZoned(CdpError):
    code = "device-zoned"
    http_status = 422


class DeviceDax(CdpError):
    code = "device-dax"
    http_status = 422


class DeviceInlineEncrypted(CdpError):
    code = "device-inline-encrypted"
    http_status = 422


class DeviceHasSwap(CdpError):
    code = "device-has-swap"
    http_status = 422


class DeviceReadOnly(CdpError):
    code = "device-read-only"
    http_status = 422


class DeviceOutOfLimits(CdpError):
    code = "device-out-of-limits"
    http_status = 422


class DiskChanged(CdpError):
    """A captured disk was resized, replaced or removed."""

    code = "disk-changed"
    http_status = 409


class KernelUnsupported(CdpError):
    """A feature that capture needs is not in this kernel."""

    code = "kernel-unsupported"
    http_status = 422


class KernelLockedDown(CdpError):
    code = "kernel-locked-down"
    http_status = 422


class PrivilegeMissing(CdpError):
    code = "privilege-missing"
    http_status = 403


class BpffsMissing(CdpError):
    code = "bpffs-missing"
    http_status = 422


class BpfObjectMissing(CdpError):
    """The compiled program was not installed with the package."""

    code = "bpf-object-missing"


class BpfFailed(CdpError):
    """A bpf call failed that should have worked."""

    code = "bpf-failed"


class CalibrationFailed(CdpError):
    """The program could not learn where the kernel keeps memory: payload cannot be read."""

    code = "calibration-failed"


class CaptureMissing(CdpError):
    """Nothing is pinned there."""

    code = "capture-missing"
    http_status = 404


class CaptureMismatch(CdpError):
    """What is pinned captures other disks, or was made by an incompatible version."""

    code = "capture-mismatch"
    http_status = 409


class SpoolMissing(CdpError):
    """The drainer has not created the raw spool of this capture (yet)."""

    code = "raw-spool-missing"
    transient = True
    http_status = 503


class SpoolRangeGone(CdpError):
    """A range of the raw spool was asked for that was released, or is not drained yet."""

    code = "raw-spool-range-gone"
    http_status = 416


class SpoolOnProtectedDisk(CdpError):
    """Draining onto a captured disk would feed itself."""

    code = "raw-spool-on-protected-disk"
    http_status = 422


class DrainerBusy(CdpError):
    """Another drainer is at work on the same raw spool."""

    code = "drainer-busy"
    transient = True
    http_status = 409


class NotSettled(CdpError):
    """Writes that were in flight have not completed in time."""

    code = "writes-not-settled"
    transient = True
    http_status = 503
