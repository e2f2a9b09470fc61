"""``cdp-pe``: the process inside the PE. It follows, keeps the replicated system ready to start, and obeys.

It is never PID 1 (init starts it again when it ends) and may be killed at any instant.
"""

from __future__ import annotations

import asyncio
import resource
import time
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from journal import wire
from journal.errors import CdpError
from standby.pe import network
from standby.pe.boot import Kexec, Loader, ReplicatedSystem
from standby.pe.config import CONFIG_SERIAL, PeConfig, device_by_serial, load
from standby.pe.control import Control
from standby.pe.verbs import Verbs
from standby.replay.compare import StandbyComparison
from standby.replay.device import BlockDisk
from standby.replay.fetch import HttpTransport
from standby.replay.follow import Follower
from standby.replay.ports import SystemClock

CONSUMER = "standby"
"""The name of the standby's cursor on the server. A machine has one standby."""


class Standby:
    """Everything that runs in the PE."""

    def __init__(self, config: PeConfig, disks: Mapping[int, BlockDisk], mac: str, loader: Loader) -> None:
        self._config = config
        self._disks = disks
        self._mac = mac
        self._loader = loader

    async def run(self) -> None:
        """Until cancelled, or until a part of it dies, which ends the process."""
        config, clock = self._config, SystemClock()
        async with HttpTransport(
            config.server,
            config.ca_pem,
            uuid.UUID(config.machine),
            consumer=CONSUMER,
            credential=config.credential,
            secret=config.secret,
        ) as transport:
            system = self._system(transport)
            follower = Follower(
                uuid.UUID(config.machine),
                transport,
                self._disks,
                clock=clock,
                offload=asyncio.to_thread,
                observer=system,
            )
            comparison = StandbyComparison(follower, transport, self._disks, clock=clock, offload=asyncio.to_thread)
            verbs = Verbs(follower, system, comparison)
            control = Control(
                transport.session,
                config.server,
                hello=self._hello,
                report=lambda: _report(follower, verbs, system, comparison),
                verbs=verbs.table(),
                leaving="finish_boot",
                departure=verbs.depart,
                clock=clock,
            )
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(follower.run())
                tasks.create_task(control.run())
                tasks.create_task(comparison.watch())

    def _system(self, transport: HttpTransport) -> ReplicatedSystem:
        async def service_addresses() -> list[str]:
            return (await transport.state()).service_addresses

        return ReplicatedSystem(
            {index: disk.path for index, disk in self._disks.items()},
            mac=self._mac,
            server=self._config.server,
            service_addresses=service_addresses,
            loader=self._loader,
        )

    def _hello(self) -> wire.Hello:
        disks = [
            wire.DiskInfo(index=index, name=disk.path.name, size_bytes=disk.size_bytes, sector_bytes=disk.sector_bytes)
            for index, disk in self._disks.items()
        ]
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return wire.Hello(role="pe", version=_version(), boot_id=boot_id, disks=disks)


def _report(
    follower: Follower, verbs: Verbs, system: ReplicatedSystem, comparison: StandbyComparison
) -> wire.StandbyReport:
    now = follower.status()
    error = now.error or system.error
    permanent = now.error is not None and not now.error.transient
    draining = now.state in ("draining", "drained")
    if verbs.leaving or (draining and not comparison.holding):
        state = "taking-over"
    elif permanent:
        state = "failed"
    elif draining or now.state == "following":
        state = "ready" if system.ready else "following"
    else:
        state = {"starting": "pe-booting", "seeding": "seeding"}.get(now.state, "seeding")
    return wire.StandbyReport(
        state=state,
        applied=str(now.applied) if now.applied is not None and now.consistent else None,
        applied_at_s=None if now.sealed_at_ns is None or not now.consistent else now.sealed_at_ns / 1e9,
        backlog_bytes=now.backlog_bytes,
        kexec_ready=system.ready,
        progress=now.progress or comparison.progress,
        cpu_s=time.process_time(),
        resident_bytes=int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize(),
        error=None if error is None else error.as_dict(),
    )


def _version() -> str:
    try:
        return version("cdp-standby")
    except PackageNotFoundError:
        return "pe"  # the image carries our modules, not our distribution


def main() -> None:
    """Runs until it is killed. Exit status 1 after an error that was told on the console."""
    try:
        config = load(device_by_serial(CONFIG_SERIAL))
        card = network.bring_up(config.network)
        print(f"cdp-pe: {config.network.address} on {card.name}, server {config.server}", flush=True)  # noqa: T201
        with ExitStack() as stack:
            disks: dict[int, BlockDisk] = {}
            for disk in config.disks:
                disks[disk.index] = BlockDisk(device_by_serial(disk.serial))
                stack.callback(disks[disk.index].close)
            asyncio.run(Standby(config, disks, card.mac, Kexec()).run())
    except CdpError as error:
        raise SystemExit(f"cdp-pe: {error}") from error


if __name__ == "__main__":
    main()
