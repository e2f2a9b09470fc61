"""What can go wrong in the lab."""

from __future__ import annotations

from journal.errors import CdpError


class LabFailed(CdpError):
    """A step of the lab failed; ``fields`` and the log that it names say why."""

    code = "lab-failed"


class LabNotReady(CdpError):
    """Something did not come up before its deadline."""

    code = "lab-not-ready"
