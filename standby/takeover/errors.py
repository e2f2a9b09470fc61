"""What can go wrong in a takeover, each with its remedy."""

from __future__ import annotations

from journal.errors import CdpError


class TakeoverActive(CdpError):
    """Only one takeover of a machine can be active."""

    code = "takeover-active"
    http_status = 409


class TakeoverUnknown(CdpError):
    """No such takeover, or none in a state to which the command applies."""

    code = "takeover-unknown"
    http_status = 404


class TakeoverRefused(CdpError):
    """The command cannot be carried out in this state; nothing was changed."""

    code = "takeover-refused"
    http_status = 409


class NotReady(CdpError):
    """The readiness check did not pass in time; nothing was changed."""

    code = "not-ready"
    http_status = 409


class SourceAlive(CdpError):
    """An unplanned takeover, but the source does not look gone."""

    code = "source-alive"
    http_status = 409


class FenceIncomplete(CdpError):
    """The source still holds a service address after it was told to give it up."""

    code = "fence-incomplete"
    http_status = 409


class LeaseExpired(CdpError):
    """The source was fenced too late: it may have thawed itself and accepted writes after the seal."""

    code = "quiesce-lease-expired"


class PhaseDeadline(CdpError):
    """A phase did not finish within its deadline."""

    code = "phase-deadline"


class Unprepared(CdpError):
    """The PE was restarted after the injection; nothing was started, all of it is done again."""

    code = "unprepared"


class StandbyReset(CdpError):
    """The standby was reset after it may have been started: only a person can tell what its disks hold."""

    code = "standby-reset"


class WrongPosition(CdpError):
    """A side reports another position than the one it had to reach."""

    code = "wrong-position"


class GenerationConflict(CdpError):
    """Another generation was started meanwhile: a new seed, or another takeover."""

    code = "generation-conflict"
    http_status = 409


class IllegalTransition(CdpError):
    """A defect of ours: the transition table has no such edge."""

    code = "illegal-transition"


class InvariantBroken(CdpError):
    """A defect of ours: a record that must not exist."""

    code = "invariant-broken"


class RecordDamaged(CdpError):
    """A stored takeover record cannot be read."""

    code = "takeover-record-damaged"
