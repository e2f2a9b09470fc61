"""What the PE holds between injection and kexec, and what it means that it has lost it.

The PE's process knows what it injected; its kernel knows the disks and the addresses. Either may be restarted.

    the PE answers                      its kernel (``boot_id``)            so
    it starts the system                -                                   it leaves, or is told again
    it knows of no injection            the one of the injection            no kexec: ``Unprepared``, all is done again
    it knows of no injection            another, but nothing was told yet   the same
    it knows of no injection            another                             it may have run: ``StandbyReset``, a person
                                                                            has to tell
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from journal.errors import CdpError, NotInjected
from standby.takeover.errors import StandbyReset, Unprepared
from standby.takeover.ports import Ports
from standby.takeover.record import TakeoverRecord
from standby.takeover.states import Act, Outcome

LEAVING_S_MAX = 3.0
"""A PE that still reports so long after it was told to start the system has not started it."""
_BOOT_ID = "boot_id"
_NOT_STARTED = "not_started"


class Injection:
    """Of one takeover, as far as the record and the PE tell. ``save`` makes the record durable."""

    def __init__(self, record: TakeoverRecord, ports: Ports, save: Callable[[], Awaitable[None]]) -> None:
        self._record = record
        self._ports = ports
        self._save = save
        self._told = False
        """The PE was asked to start the system since it was last certain that it did not."""

    def made(self) -> dict[str, Any]:
        """Evidence for the record: which kernel it was made from. Asked before anything is told to start."""
        return {_BOOT_ID: self._boot_id()}

    async def start(self) -> None:
        """Tell the PE to start the system. Raises ``Unprepared``, ``StandbyReset`` and what the port raises."""
        seen, injected = self._ports.pe.seen(self._record.machine), self._made_from()
        if not self._may_have_been_told() and seen.connected and injected not in (None, self._boot_id()):
            raise self._lost()
        self._told = True
        await self._tell()

    async def check_left(self, since_s: float) -> None:
        """A PE that reports ``since_s`` after it was told to leave is told again; a new process knows nothing of it.

        Raises ``Unprepared`` and ``StandbyReset``.
        """
        if self._noted() and await self._ports.hypervisor.state(self._record.spec) == "off":
            await self._ports.hypervisor.start_pe(self._record.spec)  # we died between powering it off and that
        if self._record.pending(Act.REDEFINE) or not self._stays(since_s):
            return
        try:
            await self._tell()
        except Unprepared:
            await self._boot_pe_again()
            raise
        except StandbyReset:
            raise
        except (CdpError, OSError, TimeoutError):
            return  # it left meanwhile, or will be asked again

    def _stays(self, since_s: float) -> bool:
        seen = self._ports.pe.seen(self._record.machine)
        failed = seen.report is not None and seen.report.state == "failed"
        return seen.connected and seen.silent_s < LEAVING_S_MAX / 2 and (failed or since_s > LEAVING_S_MAX)

    async def _boot_pe_again(self) -> None:
        """A domain that would boot from its disk must not, from the moment in which that disk is compared again.

        That is only when this act has its result: until then the server gives the PE nothing to write. The intent is
        stored first; whoever goes on after a kill knows by it that the PE of a new kernel has been started by us.
        """
        if not self._record.done(Act.REDEFINE):
            return
        probe = self._record.last(Act.PROBE)
        assert probe is not None, "this is part of that act"
        probe.evidence = {_NOT_STARTED: "the PE was restarted; its domain boots it again"}
        await self._save()
        await self._ports.hypervisor.destroy(self._record.spec)
        await self._ports.hypervisor.start_pe(self._record.spec)

    def _noted(self) -> bool:
        for entry in reversed(self._record.entries):
            if entry.act is Act.FINISH_BOOT:
                return False
            if entry.act is Act.PROBE and _NOT_STARTED in entry.evidence:
                return True
        return False

    async def _tell(self) -> None:
        try:
            await self._ports.pe.finish_boot(self._record.machine, self._record.id)
        except NotInjected as error:
            raise self._lost() from error

    def _lost(self) -> CdpError:
        injected = self._made_from()
        same_kernel = injected is not None and self._boot_id() == injected
        if same_kernel or self._noted() or not self._may_have_been_told():
            self._told = False
            return Unprepared(
                "The standby's PE was restarted after the injection, before it started the system.",
                remedy="See the console of the standby's domain for why; it is drained and injected again.",
            )
        domain = self._record.spec.domain_name
        return StandbyReset(
            "The standby was reset after it was told to start the replicated system: that may have run or not.",
            remedy=f"Let {domain!r} boot from its disk and retry; or write the disks at the cut with 'cdp recover'.",
            domain=domain,
        )

    def _may_have_been_told(self) -> bool:
        ended = [entry for entry in self._record.entries if entry.act is Act.FINISH_BOOT and entry.outcome is not None]
        return self._told or any(entry.outcome is not Outcome.UNPREPARED for entry in ended)

    def _boot_id(self) -> str | None:
        return self._ports.pe.seen(self._record.machine).boot_id

    def _made_from(self) -> str | None:
        injected = self._record.last(Act.INJECT)
        return None if injected is None else injected.evidence.get(_BOOT_ID)
