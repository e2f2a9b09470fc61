"""What can go wrong in the agent, as errors with a remedy."""

from __future__ import annotations

from journal.errors import CdpError, NoRecoveryPoint


class ConfigInvalid(CdpError):
    """The configuration file is missing, malformed, or asks for something that cannot be."""

    code = "config-invalid"
    http_status = 422


class NotJoined(CdpError):
    """This machine has no identity yet: it was never enrolled."""

    code = "not-joined"
    http_status = 409


class JoinFailed(CdpError):
    """Enrolment was refused, or the server is not the one that the token names."""

    code = "join-failed"
    http_status = 403


class SpoolOnProtectedDisk(CdpError):
    """The spool would lie on a protected disk: every segment would cause the next one to hold it."""

    code = "spool-on-protected-disk"
    http_status = 422


class SpoolTooSmall(CdpError):
    """The spool's directory cannot hold what the configuration says it may."""

    code = "spool-too-small"
    http_status = 507


class ServerUnreachable(CdpError):
    """No answer from the server, or none that makes sense."""

    code = "server-unreachable"
    transient = True
    http_status = 503


def no_recovery_point(why: str) -> NoRecoveryPoint:
    """For who asks while a seed or resync has not caught up: it passes."""
    error = NoRecoveryPoint(
        f"There is no recovery point now: {why}.",
        remedy="Wait until 'cdp status' shows no seed or resync, then repeat it.",
        why=why,
    )
    error.transient = True
    return error


class Fenced(CdpError):
    """This machine is fenced: another side owns its history and its addresses."""

    code = "fenced"
    http_status = 409


class NotFencedHere(CdpError):
    """An order that makes sense on a fenced machine only, or for another generation."""

    code = "not-fenced-here"
    http_status = 409


class DiskReadFailed(CdpError):
    """A protected disk cannot be read while it is being copied."""

    code = "disk-read-failed"
    transient = True


class DiskChanged(CdpError):
    """A protected disk has another size than when its history began, or is gone."""

    code = "disk-changed"
    http_status = 409


class NotComparable(CdpError):
    """What the disks hold at a position cannot be told now; nothing is wrong with them."""

    code = "not-comparable"
    transient = True
    http_status = 409


class HookFailed(CdpError):
    """A quiesce hook did not do its work in time."""

    code = "hook-failed"


class NothingToFreeze(CdpError):
    """An application-consistent bookmark was asked for, but the machine has neither hooks nor file systems for it."""

    code = "nothing-to-freeze"
    http_status = 409


class TakeoverUnderWay(CdpError):
    """The machine is quiesced for a takeover."""

    code = "takeover-under-way"
    transient = True
    http_status = 409


class LimitExceeded(CdpError):
    """The journal alone is above the bandwidth limit, and the spool half full."""

    code = "limit-exceeded"
    transient = True


class UnknownVerb(CdpError):
    """The server asked for something that this agent does not know, or with arguments that it cannot read."""

    code = "unknown-verb"
    http_status = 400


class DrainerFailed(CdpError):
    """The drainer process ends again and again."""

    code = "drainer-failed"
