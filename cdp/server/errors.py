"""What the server refuses, beyond the errors of ``journal.errors`` and of the store."""

from __future__ import annotations

from journal.errors import CdpError


class ConfigInvalid(CdpError):
    """The configuration file is missing, not TOML, or has an unknown key or a bad value."""

    code = "config-invalid"


class TokenInvalid(CdpError):
    """A join token that this server never issued, or that is not one at all."""

    code = "token-invalid"
    http_status = 401


class TokenExpired(CdpError):
    """A join token whose time is over."""

    code = "token-expired"
    http_status = 401


class TokenUsed(CdpError):
    """A join token that has been used: it works once."""

    code = "token-used"
    http_status = 401


class TokenForeign(CdpError):
    """A join token of another role."""

    code = "token-foreign"
    http_status = 403


class BodyTooLarge(CdpError):
    """The announced body is larger than anything that is valid here."""

    code = "body-too-large"
    http_status = 413


class PeerAway(CdpError):
    """The agent or PE is not connected."""

    code = "peer-away"
    transient = True
    http_status = 503


class CallTimedOut(CdpError):
    """The agent or PE is connected but did not answer within the deadline."""

    code = "call-timed-out"
    transient = True
    http_status = 504


class UnexpectedFrame(CdpError):
    """A control frame that is not a message of the protocol, or not one for this moment."""

    code = "unexpected-frame"
    http_status = 400


class DisksChanged(CdpError):
    """The agent reports other disks than those that are protected."""

    code = "disks-changed"
    http_status = 409


class StandbyMissing(CdpError):
    """The machine has no standby specification, so there is nothing to define, start or take over to."""

    code = "standby-missing"
    http_status = 409


class StandbyBusy(CdpError):
    """A takeover is under way, or the standby runs the machine: its domain must be left alone."""

    code = "standby-busy"
    http_status = 409


class ReplicaInUse(CdpError):
    """A PE came up on disks from which the taken-over machine runs: replaying onto them would destroy its writes."""

    code = "replica-in-use"
    http_status = 409


class UnknownExport(CdpError):
    """The image is not held: the export was ended, or nobody read it for too long."""

    code = "unknown-export"
    http_status = 404


class ExportDiffers(CdpError):
    """An export of that id exists at another position."""

    code = "export-differs"
    http_status = 409


class TakeoverMissing(CdpError):
    """There is no such takeover."""

    code = "takeover-missing"
    http_status = 404


class StateDirectoryInvalid(CdpError):
    """The server's directory holds something that the server did not write or cannot read."""

    code = "state-directory-invalid"


class PolicyInvalid(CdpError):
    """A retention policy that this store cannot keep."""

    code = "policy-invalid"
    http_status = 400


class ListenFailed(CdpError):
    """The server's port cannot be listened at."""

    code = "listen-failed"


class BookmarksFull(CdpError):
    """The machine has as many bookmarks as it may have."""

    code = "bookmarks-full"
    http_status = 409


class ReseedOrdered(CdpError):
    """The standby has to compare its disks with the store before it follows again."""

    code = "history-changed"
    transient = True
    http_status = 409
