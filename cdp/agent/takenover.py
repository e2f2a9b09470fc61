"""The replicated agent on the other side: it finds itself in a machine that a takeover has made.

The standby's disk is the source's disk, so this agent starts there with the source's identity. Two things tell it
apart: the kernel argument ``cdp.takeover=ID`` of the first boot, and the file that the injection wrote for the boots
after it. It reports that the system is up, and does nothing else: no capture, no push, no fence of the source's.
"""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path
from typing import Final

import msgspec

from cdp.agent.errors import HookFailed

MARKER: Final = Path("/etc/cdp/takeover.json")
CMDLINE: Final = Path("/proc/cmdline")
POLL_S: Final = 2.0
_ARGUMENT = re.compile(r"(?:^|\s)cdp\.takeover=(\S+)")


class Marker(msgspec.Struct, kw_only=True):
    """What the injection writes. Other fields are for other readers."""

    takeover: str
    server: str = ""


def takeover_id(marker: Path = MARKER, cmdline: Path = CMDLINE) -> str | None:
    """The takeover that made this machine; None on a source."""
    found = _ARGUMENT.search(cmdline.read_text()) if cmdline.exists() else None
    if found is not None:
        return found[1]
    try:
        return msgspec.json.decode(marker.read_bytes(), type=Marker).takeover
    except FileNotFoundError:
        return None


def yield_the_cpu(to_others: bool) -> None:
    """Run only when nobody else wants to, or normally again. While the machine starts, every second of CPU that this
    agent takes (its imports, its asking) is a second of the service's downtime."""
    policy = os.SCHED_IDLE if to_others else os.SCHED_OTHER
    # Threads that exist already keep their own policy: call it before there are any.
    os.sched_setscheduler(0, policy, os.sched_param(0))


async def system_up() -> None:
    """Return when the system has finished starting, as systemd sees it; units that failed do not hold it up."""
    while True:
        try:
            process = await asyncio.create_subprocess_exec(
                # --wait returns when starting is over; without a bus, early on, it fails and is asked again.
                *("systemctl", "is-system-running", "--wait"),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
            )
        except FileNotFoundError as error:
            raise HookFailed(
                "There is no systemctl: whether the system is up cannot be told.",
                remedy="Commit the takeover by hand once its services answer.",
            ) from error
        output, _ = await process.communicate()
        if output.decode().strip() in ("running", "degraded"):
            return
        await asyncio.sleep(POLL_S)
