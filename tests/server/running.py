"""A real server on loopback: real TLS, real store, and clients as agents, PEs and operators have them."""

from __future__ import annotations

import io
import json
import ssl
import time
import uuid
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from cdp.server import messages as m
from cdp.server.app import OPERATOR_FILE, Server
from cdp.server.config import Config, Limits, StoreFiles
from journal import wire
from journal.encoder import Encoder
from journal.extent import Extents, Kind
from journal.position import Position
from journal.segment import Flags
from standby.pe.config import PeConfig
from standby.spec import MachineSpec, SourceDomain

DISKS = [
    wire.DiskInfo(index=0, name="vda", size_bytes=64 << 20),
    wire.DiskInfo(index=1, name="vdb", size_bytes=8 << 20),
]


class MemoryTarget:
    """A hypervisor in memory, behind the port that the server has for hypervisors."""

    def __init__(self) -> None:
        self.states: dict[str, str] = {}
        self.configs: list[PeConfig] = []
        self.destroyed_sources: list[str] = []

    def state(self, spec: MachineSpec) -> str:
        return self.states.get(spec.machine, "absent")

    def define_pe(self, spec: MachineSpec, config: PeConfig) -> None:
        self.states.setdefault(spec.machine, "off")
        self.configs.append(config)

    def start(self, spec: MachineSpec) -> None:
        self.states[spec.machine] = "running"

    def destroy(self, spec: MachineSpec) -> None:
        if spec.machine in self.states:
            self.states[spec.machine] = "off"

    def remove(self, spec: MachineSpec) -> None:
        self.states.pop(spec.machine, None)

    def redefine_for_disk(self, spec: MachineSpec) -> None:
        assert spec.machine in self.states

    def destroy_source(self, source: SourceDomain) -> None:
        self.destroyed_sources.append(source.domain)


class Client:
    """One HTTPS session with one credential."""

    def __init__(self, url: str, ca_pem: str, headers: dict[str, str]) -> None:
        context = ssl.create_default_context(cadata=ca_pem)
        self.url = url
        self.session = aiohttp.ClientSession(url, headers=headers, connector=aiohttp.TCPConnector(ssl=context))

    async def ask(self, method: str, path: str, body: Any = None, **query: Any) -> Any:
        """The decoded JSON; raises the typed error of a refusal."""
        data = None if body is None else msgspec.json.encode(body)
        async with self.session.request(method, path, data=data, params={k: str(v) for k, v in query.items()}) as got:
            raw = await got.read()
        if got.status >= 400:
            wire.raise_remote(json.loads(raw))
        return json.loads(raw)

    async def raw(self, path: str, **query: Any) -> bytes:
        async with self.session.get(path, params={k: str(v) for k, v in query.items()}) as got:
            raw = await got.read()
        if got.status >= 400:
            wire.raise_remote(json.loads(raw))
        return raw

    async def put(self, machine: str, position: Position, raw: bytes | bytearray) -> wire.StoredAnswer:
        path = wire.SEGMENT.format(machine=machine, generation=position.generation, seq=position.seq)
        async with self.session.put(path, data=io.BytesIO(raw), headers={"Content-Length": str(len(raw))}) as got:
            answer = await got.read()
        if got.status >= 400:
            wire.raise_remote(json.loads(answer))
        return msgspec.json.decode(answer, type=wire.StoredAnswer)


class Running:
    """The server and everything a test needs to talk to it."""

    def __init__(self, server: Server, target: MemoryTarget) -> None:
        self.server = server
        self.target = target
        self.url = f"https://127.0.0.1:{server.port}"
        self.ca_pem = server.authority.pem
        self._clients: list[Client] = []
        held = msgspec.json.decode((server.directory / OPERATOR_FILE).read_bytes(), type=m.OperatorFile)
        self.operator_file = held
        self.operator = self.client(wire.authorization(held.credential, held.secret))

    def client(self, headers: dict[str, str] | None = None) -> Client:
        client = Client(self.url, self.ca_pem, headers or {})
        self._clients.append(client)
        return client

    async def join(self, token: str, role: str = "agent") -> tuple[Client, wire.JoinAnswer]:
        joined = msgspec.convert(
            await self.client().ask("POST", wire.JOIN, {"token": token, "role": role, "name": "host"}), wire.JoinAnswer
        )
        return self.client(wire.authorization(joined.credential, joined.secret)), joined

    async def add_machine(self, name: str = "db1") -> tuple[str, Client]:
        """A joined machine and its agent's client."""
        issued = await self.operator.ask("POST", m.MACHINES, {"name": name})
        agent, _ = await self.join(issued["token"])
        return issued["machine"], agent

    async def protected(self, name: str = "db1", **request: Any) -> tuple[str, Client]:
        machine, agent = await self.add_machine(name)
        self.server.store.update_disks(uuid.UUID(machine), DISKS)
        await self.operator.ask("PUT", m.PROTECTION.format(name=name), request)
        return machine, agent

    async def close(self) -> None:
        for client in self._clients:
            await client.session.close()


@asynccontextmanager
async def running(directory: Path, **changes: Any) -> AsyncIterator[Running]:
    """A server in ``directory``; small files, so that a test stays small."""
    settings: dict[str, Any] = {
        "directory": str(directory),
        "listen": ("127.0.0.1",),
        "port": 0,
        "store": StoreFiles(file_bytes=80 << 20, map_bytes=1 << 30),
        "limits": Limits(feed_wait_s_max=10.0),
    }
    target = changes.pop("target", None) or MemoryTarget()
    async with Server(Config(**(settings | changes)), target) as server:
        held = Running(server, target)
        try:
            yield held
        finally:
            await held.close()


class Writer:
    """Seals segments one after another, as an agent does."""

    def __init__(self, machine: str, generation: int = 1, parent: Position | None = None) -> None:
        self.machine = uuid.UUID(machine)
        self.encoder = Encoder(self.machine)
        self.tip = Position.genesis(self.machine, generation, parent)

    def seal(
        self, writes: Iterable[tuple[int, int, bytes]] = (), flags: Flags = Flags.NONE, sealed_at_s: float | None = None
    ) -> bytearray:
        """``writes``: (disk, offset, data), sorted."""
        writes = list(writes)
        extents = Extents.from_rows([(disk, offset, len(data), Kind.DATA) for disk, offset, data in writes])
        now_ns = time.time_ns() if sealed_at_s is None else int(sealed_at_s * 1e9)
        header, raw = self.encoder.encode(
            self.tip,
            extents,
            [data for _, _, data in writes],
            opened_at_ns=now_ns,
            sealed_at_ns=now_ns,
            sealed_monotonic_ns=time.monotonic_ns(),
            flags=flags,
        )
        self.tip = header.position
        return raw
