"""The server process: configuration, logging, signals, systemd."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from pathlib import Path

import uvloop

from cdp.server import config as configuration
from cdp.server.app import Server
from cdp.server.config import Config
from cdp.server.memory import give_memory_back
from standby.target.domain import LibvirtTarget

log = logging.getLogger(__name__)


def run(path: Path | None) -> None:
    """Serve until SIGTERM or SIGINT. Raises ``CdpError`` if the server cannot start."""
    config = configuration.load(path)
    _log_to_stderr(config.log_level)
    give_memory_back()
    uvloop.run(_run(config))


async def _run(config: Config) -> None:
    target = LibvirtTarget(config.pe_directory)
    try:
        async with Server(config, target) as server:
            await _serve(server)
    finally:
        target.close()


async def _serve(server: Server) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    log.info("serving at port %d, CA fingerprint %s", server.port, server.authority.fingerprint)
    _tell_systemd("READY=1")
    running = asyncio.create_task(server.run(), name="server")
    stopping = asyncio.create_task(stop.wait(), name="wait for a signal")
    await asyncio.wait((running, stopping), return_when=asyncio.FIRST_COMPLETED)
    _tell_systemd("STOPPING=1")
    stopping.cancel()
    running.cancel()
    try:
        await running  # a defect in a background task ends the process visibly
    except asyncio.CancelledError:
        log.info("stopping")


def _tell_systemd(state: str) -> None:
    """sd_notify: a datagram to the socket that systemd names; nothing happens without one."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notify:
        notify.connect("\0" + path[1:] if path.startswith("@") else path)
        notify.sendall(state.encode())


def _log_to_stderr(level: str) -> None:
    logging.basicConfig(
        stream=sys.stderr, level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
