"""The fencing argument: why nobody else can serve when the standby does. Pure functions of evidence.

Two things must never happen: two sides that hold the service address, and two sides whose writes are accepted. The
second is excluded by the store alone: it accepts one generation, and the next one is started before the standby takes
the address. The first needs evidence about the source:

*Planned.* The agent gave the addresses up and looked again: none remains. It keeps that across a reboot.

*Unplanned.* Nothing is known of the source except what it does not do, so several things must hold:

    means                              what it shows
    source domain destroyed            certain: the hypervisor says that it is off
    agent silent for ``silence_s``     its process, its machine or its network is gone
    operator's word (source-is-down)   replaces the silence, nothing else
    nobody answers at the addresses    whoever may be there cannot be reached by clients either
    operator's force                   replaces all of it; the operator has seen the machine

A source that comes back after an unplanned takeover still believes that it owns the address, until its agent starts: a
fenced or superseded agent drops it before the network serves (boot guard), or within its first push.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_interface
from typing import Any

from standby.takeover.errors import FenceIncomplete, SourceAlive
from standby.takeover.record import Options


@dataclass(frozen=True, slots=True)
class SourceEvidence:
    """What is known of the source in an unplanned takeover. ``answering``: address -> who; None if nobody was asked."""

    silent_s: float
    destroyed: bool
    answering: dict[str, str] | None

    def as_dict(self) -> dict[str, Any]:
        return {"silent_s": round(self.silent_s, 3), "destroyed": self.destroyed, "answering": self.answering}


def silence_left_s(evidence: SourceEvidence, silence_s: float, options: Options) -> float:
    """For how long the source must stay silent still, before its addresses are asked."""
    if evidence.destroyed or options.source_is_down or options.force:
        return 0.0
    return max(0.0, silence_s - evidence.silent_s)


def check_source_gone(evidence: SourceEvidence, silence_s: float, options: Options) -> None:
    """Raise ``SourceAlive`` unless the evidence allows the next generation to start."""
    if options.force:
        return
    if silence_left_s(evidence, silence_s, options) > 0:
        raise SourceAlive(
            f"The source reported {evidence.silent_s:.1f} s ago; it counts as gone after {silence_s:.0f} s of silence.",
            remedy="Use a planned takeover; or, if you know that the machine is off, say --source-is-down.",
            **evidence.as_dict(),
        )
    if evidence.answering is None:
        raise SourceAlive("Nobody has looked whether the service address is still in use.", remedy="Try again.")
    if evidence.answering:
        who = ", ".join(f"{address} ({by})" for address, by in evidence.answering.items())
        raise SourceAlive(
            f"Somebody still answers at {who}.",
            remedy="Power the source off or cut its network, then try again; --force takes it over regardless.",
            **evidence.as_dict(),
        )


def check_source_fenced(evidence: dict[str, Any], addresses: Sequence[str]) -> None:
    """Raise ``FenceIncomplete`` unless the agent's evidence shows that it holds none of ``addresses`` any more."""
    remaining = evidence.get("remaining")
    if not isinstance(remaining, list) or remaining:
        raise FenceIncomplete(
            f"The source still holds {remaining or 'an unknown number of service addresses'}.",
            remedy="See what puts the address back on the source (a network manager, a cluster agent) and stop it.",
            addresses=list(addresses),
            evidence=evidence,
        )


def check_held(held: Sequence[str], addresses: Sequence[str]) -> None:
    """Raise ``FenceIncomplete`` unless the standby holds every service address."""
    have = {ip_interface(text).ip for text in held}
    missing = [text for text in addresses if ip_interface(text).ip not in have]
    if missing:
        raise FenceIncomplete(
            f"The standby does not hold {', '.join(missing)}.",
            remedy="See the PE's console for the network device and its addresses.",
            missing=missing,
        )
