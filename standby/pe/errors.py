"""Why the replicated system could not be read, changed or started."""

from __future__ import annotations

from journal.errors import CdpError


class SystemNotFound(CdpError):
    """No root file system, boot loader or kernel was found on the replicated disks."""

    code = "system-not-found"
    http_status = 422


class SystemUnreadable(CdpError):
    """The replicated file systems could not be mounted or read; at another recovery point it may work."""

    code = "system-unreadable"
    transient = True


class InjectionFailed(CdpError):
    """The replicated system could not be changed."""

    code = "injection-failed"


class KexecFailed(CdpError):
    """The replicated kernel could not be loaded or started."""

    code = "kexec-failed"
