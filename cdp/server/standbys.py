"""The standby's domain on its hypervisor: define, start, stop, remove, and a cache of what the hypervisor says.

Defining gives the PE a credential of its own and ends the one before; removing ends it. So a PE's credential is worth
something only while its standby exists.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

from cdp.server.auth import Authenticator
from cdp.server.control import Hub
from cdp.server.errors import StandbyBusy, StandbyMissing
from cdp.server.workers import Workers
from journal.errors import CdpError
from standby.spec import MachineSpec, SourceDomain, StandbySpec
from standby.target.config_disk import PeConfig, config_of

if TYPE_CHECKING:
    from cdp.server.machines import Machines
    from cdp.store import Store

log = logging.getLogger(__name__)

POLL_S: Final = 5.0


class Target(Protocol):
    """The hypervisor side. Blocking; raises ``CdpError``. ``state`` is running, off or absent."""

    def state(self, spec: MachineSpec) -> str: ...
    def define_pe(self, spec: MachineSpec, config: PeConfig) -> None: ...
    def start(self, spec: MachineSpec) -> None: ...
    def destroy(self, spec: MachineSpec) -> None: ...
    def remove(self, spec: MachineSpec) -> None: ...
    def redefine_for_disk(self, spec: MachineSpec) -> None: ...
    def destroy_source(self, source: SourceDomain) -> None: ...


class Standbys:
    """``busy`` raises ``StandbyBusy`` while a takeover needs the domain to be left alone."""

    def __init__(
        self,
        store: Store,
        workers: Workers,
        auth: Authenticator,
        hub: Hub,
        target: Target,
        *,
        url: str,
        ca_pem: str,
        busy: Callable[[uuid.UUID], None],
    ) -> None:
        self._store = store
        self._workers = workers
        self._auth = auth
        self._hub = hub
        self._target = target
        self._url = url
        self._ca_pem = ca_pem
        self._busy = busy
        self._states: dict[uuid.UUID, str] = {}
        self._locks: dict[uuid.UUID, asyncio.Lock] = {}
        self.machines: Machines | None = None

    def check_idle(self, machine: uuid.UUID) -> None:
        self._busy(machine)

    def domain_state(self, machine: uuid.UUID) -> str:
        """What the hypervisor said last; "" if it was not asked yet or is out of reach."""
        return self._states.get(machine, "")

    async def define(self, machine: uuid.UUID) -> None:
        """Define the domain so that it boots the PE; it must be off. Idempotent."""
        self._busy(machine)
        async with self._lock(machine):
            spec, _ = await self._spec(machine)
            if await self._state(spec) == "running":
                raise StandbyBusy(
                    f"The standby of {spec.name!r} is running.", remedy=f"Run 'cdp standby stop {spec.name}' first."
                )
            await self._define(spec)

    async def start(self, machine: uuid.UUID) -> None:
        """Define the domain, if it is off, and start it. Idempotent."""
        self._busy(machine)
        await self.start_pe((await self._spec(machine))[0])

    async def start_pe(self, spec: MachineSpec) -> None:
        """The same for the takeover controller, which knows what it does."""
        async with self._lock(spec.machine_id):
            if await self._state(spec) != "running":
                await self._define(spec)
                await self._workers.outside(self._target.start, spec)
                await self._state(spec)

    async def stop(self, machine: uuid.UUID) -> None:
        """Power it off; replication resumes from the cursor at the next start."""
        self._busy(machine)
        await self.destroy((await self._spec(machine))[0])

    async def destroy(self, spec: MachineSpec) -> None:
        async with self._lock(spec.machine_id):
            await self._workers.outside(self._target.destroy, spec)
            await self._state(spec)

    async def remove(self, machine: uuid.UUID) -> None:
        """Power it off, delete its domain and disks, end its credential and cursor. A machine without one is fine."""
        self._busy(machine)
        spec = await self._workers.read(self._machines.spec, machine)
        if spec is None or spec.standby is None:
            return
        async with self._lock(machine):
            await self._workers.write(self._auth.revoke, machine, "pe")
            await self._hub.drop(machine, "pe")
            await self._workers.outside(self._target.remove, spec)
            await self._workers.write(self._store.remove_cursor, machine, "standby")
            self._states[machine] = "absent"

    async def redefine_for_disk(self, spec: MachineSpec) -> None:
        async with self._lock(spec.machine_id):
            await self._workers.outside(self._target.redefine_for_disk, spec)

    async def destroy_source(self, source: SourceDomain) -> None:
        await self._workers.outside(self._target.destroy_source, source)

    async def state(self, spec: MachineSpec) -> str:
        """Asks the hypervisor now."""
        return await self._state(spec)

    async def watch(self) -> None:
        """Keep the cache fresh, for ever. An unreachable hypervisor is shown, not fatal."""
        while True:
            for held in await self._workers.read(self._store.list_machines):
                spec = await self._workers.read(self._machines.spec, held.uuid)
                if spec is not None and spec.standby is not None:
                    try:
                        await self._state(spec)
                    except CdpError as error:
                        if self._states.get(held.uuid) != "":
                            log.warning("standby of %s: %s", held.name, error)
                        self._states[held.uuid] = ""
            await asyncio.sleep(POLL_S)

    async def _define(self, spec: MachineSpec) -> None:
        assert spec.standby is not None
        joined = await self._workers.write(
            self._auth.issue, "pe", spec.machine_id, f"standby of {spec.name}", replace=True
        )
        config = config_of(
            spec,
            spec.standby,
            server=self._url,
            ca_pem=self._ca_pem,
            credential=joined.credential,
            secret=joined.secret,
        )
        await self._workers.outside(self._target.define_pe, spec, config)

    async def _state(self, spec: MachineSpec) -> str:
        told = await self._workers.outside(self._target.state, spec)
        self._states[spec.machine_id] = told
        return told

    async def _spec(self, machine: uuid.UUID) -> tuple[MachineSpec, StandbySpec]:
        spec = await self._workers.read(self._machines.require_spec, machine)
        if spec.standby is None:
            raise StandbyMissing(
                f"{spec.name!r} has no standby.", remedy="Name one: 'cdp protect NAME --hypervisor URI ...'."
            )
        return spec, spec.standby

    @property
    def _machines(self) -> Machines:
        assert self.machines is not None, "set while the server is put together"
        return self.machines

    def _lock(self, machine: uuid.UUID) -> asyncio.Lock:
        return self._locks.setdefault(machine, asyncio.Lock())
