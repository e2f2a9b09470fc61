"""Questions to a service address from the server's place: does anybody answer, does the service?"""

from __future__ import annotations

import asyncio
import ssl
import struct
from collections.abc import Sequence
from typing import Final

from standby.spec import Probe
from standby.takeover import address as neighbours

SERVING_S: Final = 1.0
"""One question: a service that needs longer to accept is asked again by the caller."""
NEIGHBOUR_S: Final = 0.6
REACH_S: Final = 1.0
_STARTUP: Final = b"user\0cdp-probe\0database\0postgres\0\0"
_PROTOCOL_3: Final = 196608
_CANNOT_CONNECT_NOW: Final = b"C57P03"
_LINE_BYTES_MAX: Final = 4096


async def serving(address: str, probe: Probe) -> str | None:
    """None if the service answers as it should, otherwise what was seen; within ``SERVING_S``."""
    try:
        async with asyncio.timeout(SERVING_S):
            match probe.kind:
                case "tcp":
                    return await _accepts(address, probe.port)
                case "postgresql":
                    return await _postgresql(address, probe.port)
                case "http" | "https":
                    return await _http(address, probe)
    except TimeoutError:
        return "no answer"
    except (OSError, asyncio.IncompleteReadError) as error:
        return str(error) or type(error).__name__


async def answering(addresses: Sequence[str], probes: Sequence[Probe]) -> dict[str, str]:
    """Address -> who answers there: a neighbour's MAC on this link, or a probed service from anywhere."""
    asked = [(address, probe) for address in addresses for probe in probes]
    found, reached = await asyncio.gather(
        asyncio.to_thread(_neighbours, addresses),
        asyncio.gather(*(_reaches(address, probe.port) for address, probe in asked)),
    )
    for (address, probe), reaches in zip(asked, reached, strict=True):
        if reaches:
            found.setdefault(address, f"port {probe.port}")
    return found


def _neighbours(addresses: Sequence[str]) -> dict[str, str]:
    """Behind a router there is no neighbour to ask; then only the services tell."""
    found: dict[str, str] = {}
    for address in addresses:
        try:
            answers = neighbours.probe([address], listen_s=NEIGHBOUR_S)
        except (neighbours.DeviceUnknown, OSError):
            continue
        found |= {answer.address: answer.mac for answer in answers}
    return found


async def _reaches(address: str, port: int) -> bool:
    try:
        async with asyncio.timeout(REACH_S):
            return await _accepts(address, port) is None
    except (TimeoutError, OSError):
        return False


async def _accepts(address: str, port: int) -> str | None:
    _, writer = await asyncio.open_connection(address, port)
    _hang_up(writer)
    return None


async def _postgresql(address: str, port: int) -> str | None:
    """Accepting connections, not merely listening: a server in recovery answers ``cannot_connect_now``."""
    reader, writer = await asyncio.open_connection(address, port)
    try:
        writer.write(struct.pack(">II", 8 + len(_STARTUP), _PROTOCOL_3) + _STARTUP)
        await writer.drain()
        kind, length = struct.unpack(">cI", await reader.readexactly(5))
        body = await reader.readexactly(min(length - 4, _LINE_BYTES_MAX)) if length > 4 else b""
    finally:
        _hang_up(writer)
    # An authentication request, or any other refusal than "not yet", says that it is up.
    if kind == b"R" or (kind == b"E" and _CANNOT_CONNECT_NOW not in body):
        return None
    return "the database is starting up or shutting down" if kind == b"E" else "not a PostgreSQL server"


async def _http(address: str, probe: Probe) -> str | None:
    context = None
    if probe.kind == "https":
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE  # the question is whether it is up; nothing secret is sent
    reader, writer = await asyncio.open_connection(address, probe.port, ssl=context, limit=_LINE_BYTES_MAX)
    try:
        host = f"[{address}]" if ":" in address else address
        writer.write(f"GET {probe.path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        await writer.drain()
        try:
            line = await reader.readuntil(b"\r\n")
        except asyncio.LimitOverrunError:
            return "not an HTTP server"
    finally:
        _hang_up(writer)
    parts = line.split()
    if len(parts) < 2 or not parts[0].startswith(b"HTTP/") or not parts[1].isdigit():
        return "not an HTTP server"
    return None if int(parts[1]) < 500 else f"status {int(parts[1])}"


def _hang_up(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()
