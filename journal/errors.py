"""Errors that cross a boundary: a stable code, a sentence, a remedy and fields.

Permanent or transient is decided once, by the class that is raised, so that no caller has to guess whether a retry
can help.
"""

from __future__ import annotations

from typing import Any, ClassVar


class CdpError(Exception):
    """Base of every error that a person or a peer is shown.

    ``code``        stable, kebab-case; part of the API.
    ``transient``   True if the same request may succeed later without anybody changing anything.
                    It crosses with the error, so that the other side need not know the class.
    ``http_status`` what the server answers when this error ends a request.
    ``fields``      the values behind the sentence, JSON-serialisable.
    """

    code: str = "error"
    transient: bool = False
    http_status: ClassVar[int] = 500

    def __init__(self, sentence: str, *, remedy: str = "", **fields: Any) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.remedy = remedy
        self.fields = fields

    def __str__(self) -> str:
        return f"{self.sentence} {self.remedy}".rstrip()

    def as_dict(self) -> dict[str, Any]:
        """The JSON body that the server answers with, and that ``wire.raise_remote`` turns back into an error."""
        return {
            "code": self.code,
            "sentence": self.sentence,
            "remedy": self.remedy,
            "fields": self.fields,
            "transient": self.transient,
        }


class SegmentDamaged(CdpError):
    """The bytes are not a valid segment: truncated, flipped, over a limit, or inconsistent in themselves."""

    code = "segment-damaged"
    http_status = 422


class ForeignSegment(CdpError):
    """A valid segment, but of another machine."""

    code = "foreign-segment"
    http_status = 422


class PositionGap(CdpError):
    """The segment starts later than the position it would have to follow."""

    code = "position-gap"
    http_status = 409


class PositionFork(CdpError):
    """Same place in the chain, other content: two histories of one machine."""

    code = "position-fork"
    http_status = 409


class StaleGeneration(CdpError):
    """The writer belongs to a generation that has ended; it is fenced."""

    code = "stale-generation"
    http_status = 409


class UnknownGeneration(CdpError):
    """The writer names a generation that has not been started."""

    code = "unknown-generation"
    http_status = 409


class Unauthorized(CdpError):
    """No credential, or one that the server does not know (any more)."""

    code = "unauthorized"
    http_status = 401


class Forbidden(CdpError):
    """A valid credential, but not for this."""

    code = "forbidden"
    http_status = 403


class NotProtected(CdpError):
    """The machine is known, but its protection has not been started: there is no generation to write to yet."""

    code = "not-protected"
    transient = True
    http_status = 409


class BadRequest(CdpError):
    """The request itself makes no sense: a missing or malformed field, path or query argument."""

    code = "bad-request"
    http_status = 400


class DrainNotYet(CdpError):
    """The standby cannot stop at a position before its disks are consistent again: it is still comparing them."""

    code = "drain-not-yet"
    transient = True
    http_status = 409


class NotInjected(CdpError):
    """The PE was told to start the system, but has not changed it for this takeover: it was restarted since."""

    code = "not-injected"
    http_status = 409


class NoRecoveryPoint(CdpError):
    """There is no consistent state for that time. ``fields`` may name the nearest ones, in ns since the epoch.
    Transient where a seed or resync that goes on is the reason."""

    code = "no-recovery-point"
    http_status = 404


class Unavailable(CdpError):
    """The server cannot answer just now: it is shutting down or at a limit."""

    code = "unavailable"
    transient = True
    http_status = 503


class PrefillClosed(CdpError):
    """Something is stored of the machine, or its preparation was ended: its genesis does not change any more."""

    code = "prefill-closed"
    http_status = 409


class PrefillRestarted(CdpError):
    """The key is of an earlier beginning, whose work is gone: the server was restarted, or another agent began."""

    code = "prefill-restarted"
    transient = True
    http_status = 409


class PrefillUnsettled(CdpError):
    """The image of a machine of which nothing is stored may still change: nobody may copy it yet."""

    code = "prefill-unsettled"
    transient = True
    http_status = 409
