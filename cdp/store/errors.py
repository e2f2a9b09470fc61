"""What can be wrong with, or in, a store. Each error says what is the case and what to do about it."""

from __future__ import annotations

from journal.errors import CdpError


class StoreFull(CdpError):
    """No room on the disk or in the index. Raised before anything is acknowledged; what exists is kept."""

    code = "store-full"
    transient = True
    http_status = 507


class StoreFailed(CdpError):
    """The store's disk reports errors. Nothing that was not durable has been acknowledged."""

    code = "store-failed"
    http_status = 500


class StoreLocked(CdpError):
    """Another process has the store open: there is one writer."""

    code = "store-locked"
    http_status = 503


class StoreFormatUnknown(CdpError):
    """The directory is not a store, or one of another version."""

    code = "store-format-unknown"


class IndexDamaged(CdpError):
    """A row of the index does not match its checksum."""

    code = "index-damaged"


class StoredDamage(CdpError):
    """Stored bytes no longer match their digest. They are never served."""

    code = "stored-damage"


class RunDamaged(StoredDamage):
    """A file of the point-in-time index. Derived data: it is deleted and built again, nobody needs to be told."""

    code = "run-damaged"


class UnknownMachine(CdpError):
    code = "unknown-machine"
    http_status = 404


class MachineExists(CdpError):
    code = "machine-exists"
    http_status = 409


class UnknownDisk(CdpError):
    """A disk that the machine does not have, or a range outside of it. A writer may try again once the machine's disks
    have been reported."""

    code = "unknown-disk"
    transient = True
    http_status = 409


class UnknownPosition(CdpError):
    """The position is not in the store: never stored, on another branch than the one asked for, or folded away."""

    code = "unknown-position"
    http_status = 404


class PositionFolded(UnknownPosition):
    """The position is older than the base image: retention has folded it away."""

    code = "position-folded"
    http_status = 410


class UnknownBookmark(CdpError):
    code = "unknown-bookmark"
    http_status = 404


class BookmarkExists(CdpError):
    code = "bookmark-exists"
    http_status = 409


class RangeTooLarge(CdpError):
    """More data than one answer may hold. ``fields["fits_bytes"]`` is a length that does fit, from the same offset."""

    code = "range-too-large"
    http_status = 413


class RecoverFailed(CdpError):
    """The image could not be written. The store is unharmed and no half-written file carries the final name."""

    code = "recover-failed"
