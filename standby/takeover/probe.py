"""Asking from the server's place: does the service answer, and does anybody else hold the address?"""

from __future__ import annotations

import asyncio
import ssl
import struct
import time
from collections.abc import Sequence
from ipaddress import ip_address

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from standby.spec import Probe
from standby.takeover import address as drift

CONNECT_S_MAX = 0.5
"""On a LAN an open port answers in a millisecond; a machine that is booting does not answer at all."""
ANSWER_S_MAX = 0.9
HEAD_BYTES_MAX = 4096
_POSTGRESQL_3 = 3 << 16


class NetworkProbe:
    """``ProbePort`` over real sockets."""

    async def serving(self, address: str, probe: Probe) -> str | None:
        """None if ``probe`` answers at ``address`` (without prefix) as it should, otherwise what was seen."""
        try:
            async with asyncio.timeout(ANSWER_S_MAX):
                return await _ask(address, probe)
        except TimeoutError:
            return "no answer"
        except (OSError, ssl.SSLError) as error:
            return error.strerror or str(error)

    async def answering(self, addresses: Sequence[str], probes: Sequence[Probe]) -> dict[str, str]:
        """Address -> who answers there: a neighbour by its MAC, anything further away by an open port."""
        found: dict[str, str] = {}
        for mac in await asyncio.gather(*(asyncio.to_thread(_neighbour, address) for address in addresses)):
            found |= mac
        for address in addresses:
            for probe in probes:
                if address not in found and await _accepts(address, probe.port):
                    found[address] = str(probe)
        return found


class SystemClock:
    """``ClockPort`` of the real world."""

    def now_s(self) -> float:
        return time.time()

    def monotonic_s(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


async def _accepts(address: str, port: int) -> bool:
    """A refusal counts: there is a machine that refuses."""
    try:
        async with asyncio.timeout(CONNECT_S_MAX):
            _, writer = await asyncio.open_connection(address, port)
            writer.close()
            return True
    except ConnectionRefusedError:
        return True
    except (TimeoutError, OSError):
        return False


async def _ask(address: str, probe: Probe) -> str | None:
    tls: ssl.SSLContext | None = None
    if probe.kind == "https":
        tls = ssl.create_default_context()
        tls.check_hostname = False
        tls.verify_mode = ssl.CERT_NONE
    reader, writer = await asyncio.open_connection(address, probe.port, ssl=tls)
    try:
        match probe.kind:
            case "tcp":
                return None
            case "postgresql":
                return await _ask_postgresql(reader, writer)
            case "http" | "https":
                host = f"[{address}]" if ":" in address else address
                return await _ask_http(reader, writer, host, probe.path)
    finally:
        writer.close()


async def _ask_postgresql(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str | None:
    """A start-up packet is answered by anything: a request to authenticate, or a refusal by pg_hba.conf, both of which
    only a server that is ready gives. One that still recovers says so first (SQLSTATE 57P03)."""
    startup = struct.pack("!I", _POSTGRESQL_3) + b"user\0cdp-probe\0database\0cdp-probe\0\0"
    writer.write(struct.pack("!I", len(startup) + 4) + startup)
    head = await reader.read(HEAD_BYTES_MAX)
    if not head:
        return "it closed the connection"
    if head[:1] == b"E" and b"C57P03\0" in head:
        return "the database is starting up"
    return None if head[:1] in b"ER" else f"unexpected answer {head[:20]!r}"


async def _ask_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str, path: str) -> str | None:
    writer.write(f"GET {path} HTTP/1.0\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    line = (await reader.readline())[:HEAD_BYTES_MAX]
    words = line.split()
    if len(words) < 2 or not words[0].startswith(b"HTTP/") or not words[1].isdigit():
        return f"no HTTP answer ({line[:40]!r})"
    return None if int(words[1]) < 500 else f"status {words[1].decode()}"


def _neighbour(address: str) -> dict[str, str]:
    """Ask on the link, if the address is on one of ours; blocking."""
    with IPRoute() as ip:
        try:
            route = next(iter(ip.route("get", dst=address)), None)
        except NetlinkError:
            return {}
        if route is None or route.get_attr("RTA_GATEWAY") is not None or route["type"] != 1:
            return {}
        links = list(ip.get_links(route.get_attr("RTA_OIF")))
    prefix = 32 if ip_address(address).version == 4 else 128
    answers = drift.probe([f"{address}/{prefix}"], links[0].get_attr("IFLA_IFNAME"))
    return {address: f"neighbour {answers[0].mac}"} if answers else {}
