"""What only the command line can run into."""

from __future__ import annotations

from journal.errors import CdpError


class ServerUnreachable(CdpError):
    """No connection, or one that is not to be trusted."""

    code = "server-unreachable"
    transient = True


class LoginMissing(CdpError):
    """There is no operator's credential, or its file cannot be read."""

    code = "login-missing"


class NotAsAsked(CdpError):
    """A takeover or rollback came to rest somewhere else than it should have."""

    code = "not-as-asked"


class OutputExists(CdpError):
    """The file to be written exists."""

    code = "output-exists"


class RecoverFailed(CdpError):
    """The image could not be written."""

    code = "recover-failed"


class ExportFailed(CdpError):
    """nbdkit is missing, could not start, or ended by itself."""

    code = "export-failed"


class FilesFailed(CdpError):
    """Files could not be read out of the image, or not be written here."""

    code = "files-failed"


class PartMissing(CdpError):
    """This installation lacks the Python packages that the command needs."""

    code = "part-missing"


class ProofFailed(CdpError):
    """A verification, a comparison or a check found something."""

    code = "proof-failed"


class NothingDone(CdpError):
    """A result was asked for that does not exist yet."""

    code = "nothing-done"
