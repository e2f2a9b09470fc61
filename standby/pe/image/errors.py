"""Why a PE image cannot be built."""

from __future__ import annotations

from journal.errors import CdpError


class ImageBuildFailed(CdpError):
    """A step of the build failed; the end of its output is in ``fields``."""

    code = "pe-image-build-failed"


class ImageToolMissing(CdpError):
    """A program or a Python distribution that the build needs is not there."""

    code = "pe-image-tool-missing"


class PeImageMissing(CdpError):
    """The server has no PE image to give to a hypervisor."""

    code = "pe-image-missing"
    http_status = 409
