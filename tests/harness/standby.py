"""The standby without its VM: what the PE runs to follow, on this host's block devices.

python -m tests.harness.standby CONFIG          the JSON of ``StandbyConfig``; until SIGTERM
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import uuid
from contextlib import suppress
from pathlib import Path

import msgspec

from journal.wire import Hello, StandbyReport
from standby.pe.control import Control
from standby.replay.compare import StandbyComparison
from standby.replay.device import BlockDisk
from standby.replay.fetch import HttpTransport
from standby.replay.follow import Follower
from standby.replay.ports import SystemClock

REPORT_S = 0.5


class StandbyConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``disks``: target device by disk number."""

    server: str
    ca_pem: str
    machine: str
    consumer: str
    credential: str
    secret: str
    disks: dict[int, str]


async def run(config: StandbyConfig) -> None:
    machine = uuid.UUID(config.machine)
    disks = {index: BlockDisk(Path(path)) for index, path in config.disks.items()}
    transport = HttpTransport(
        config.server,
        config.ca_pem,
        machine,
        consumer=config.consumer,
        credential=config.credential,
        secret=config.secret,
    )
    async with transport:
        follower = Follower(machine, transport, disks, clock=SystemClock(), offload=asyncio.to_thread)
        comparison = StandbyComparison(follower, transport, disks, clock=SystemClock(), offload=asyncio.to_thread)
        control = Control(
            transport.session,
            config.server,
            hello=lambda: Hello(role="pe", version="test", boot_id=""),
            report=lambda: StandbyReport(state=_state(follower), applied=None, applied_at_s=None),
            verbs=comparison.verbs(),
            leaving="",
            departure=_never,
            clock=SystemClock(),
        )
        async with asyncio.TaskGroup() as group:
            work = (follower.run(), _report(follower), control.run(), comparison.watch())
            tasks = [group.create_task(one) for one in work]
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: [task.cancel() for task in tasks])


async def _never() -> None:
    raise AssertionError("nothing leaves here")


def _state(follower: Follower) -> str:
    return "following" if follower.status().consistent else "seeding"


async def _report(follower: Follower) -> None:
    """The log of a standby is what it says of itself, whenever that changes."""
    last = ""
    while True:
        status = follower.status()
        line = json.dumps({"state": status.state, "error": str(status.error) if status.error else None})
        if line != last:
            print(line, flush=True)
            last = line
        await asyncio.sleep(REPORT_S)


if __name__ == "__main__":
    with suppress(asyncio.CancelledError):
        asyncio.run(run(msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=StandbyConfig)))
