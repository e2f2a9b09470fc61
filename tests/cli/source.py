"""An agent in a few lines, for tests of the command line."""

from __future__ import annotations

import asyncio
import http.client
import json
import ssl

import aiohttp
import msgspec

from cdp.cli.client import Client
from journal import wire
from journal.segment import Flags
from tests.harness.site import Site
from tests.harness.wait import wait_until, wait_until_async
from tests.server.running import Writer

DISK_BYTES = 24 << 20
BLOCK = 4096


class Source:
    """Joined by ``cdp join``, it tells its disk and pushes what the test seals."""

    def __init__(self, site: Site, name: str) -> None:
        join = site.cdp("machines", "add", name).stdout.split()
        assert join[:2] == ["cdp", "join"]
        state = site.directory / f"{name}-state"
        site.cdp(
            *join[1:], "--state-dir", str(state), "--config", str(site.directory / f"{name}.toml"), "--disk", "/dev/vda"
        )
        identity = json.loads((state / "identity.json").read_text())
        self.machine: str = identity["machine"]
        self.ca_pem = (state / "ca.pem").read_text()
        self.headers = wire.authorization(identity["credential"], identity["secret"])
        self.url = site.url
        self._site = site
        self._name = name
        self.writer = Writer(self.machine)
        self.client = Client(site.url, self.ca_pem, self.headers)
        self.image = bytearray(DISK_BYTES)
        self.history: list[tuple[float, bytes]] = []

    def protect(self, *options: str) -> None:
        """Tell the disk, and let the operator protect the machine."""
        self.tell_disks()
        wait_until(lambda: self._site.json("status", self._name)["disks"], 10, "the disks")
        self._site.cdp("protect", self._name, *options)

    def tell_disks(self) -> None:
        asyncio.run(self._hello())

    async def _hello(self) -> None:
        context = ssl.create_default_context(cadata=self.ca_pem)
        async with (
            aiohttp.ClientSession(self.url, headers=self.headers) as session,
            session.ws_connect(wire.CONTROL, ssl=context) as control,
        ):
            disk = wire.DiskInfo(index=0, name="vda", size_bytes=DISK_BYTES)
            await control.send_bytes(
                msgspec.json.encode(wire.Hello(role="agent", version="1", boot_id="b", disks=[disk]))
            )
            socket = control.get_extra_info("socket")
        # TLS says goodbye after the session has been closed; a loop that ends before that leaves the socket open.
        await wait_until_async(lambda: socket.fileno() == -1, 10, "the end of the connection")

    def write(self, at_s: float, writes: dict[int, bytes], flags: Flags = Flags.NONE) -> None:
        raw = self.writer.seal([(0, offset, data) for offset, data in sorted(writes.items())], flags, at_s)
        position = self.writer.tip
        self.put(position.generation, position.seq, bytes(raw))
        for offset, data in writes.items():
            self.image[offset : offset + len(data)] = data
        if not flags:
            self.history.append((at_s, bytes(self.image)))

    def put(self, generation: int, seq: int, raw: bytes) -> None:
        connection = http.client.HTTPSConnection(
            "127.0.0.1", int(self.url.rsplit(":", 1)[1]), context=ssl.create_default_context(cadata=self.ca_pem)
        )
        path = wire.SEGMENT.format(machine=self.machine, generation=generation, seq=seq)
        connection.request("PUT", path, raw, self.headers)
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        connection.close()
