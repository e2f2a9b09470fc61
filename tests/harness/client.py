"""The server as a test sees it: plain blocking HTTPS with an operator's credential."""

from __future__ import annotations

import http.client
import ssl
import uuid
from typing import Any, TypeVar
from urllib.parse import urlencode, urlsplit

import msgspec

from cdp.server import messages
from journal import wire
from journal.decoder import Segment, decode
from journal.position import Position
from journal.segment import HEADER_BYTES, Header

T = TypeVar("T")
TIMEOUT_S = 15.0


class Client:
    """Raises ``OSError`` while the server is away, otherwise the typed error that it answered with."""

    def __init__(self, url: str, ca_pem: str, credential: str, secret: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self._host, self._port = parts.hostname, parts.port
        self._context = ssl.create_default_context(cadata=ca_pem)
        self._headers = wire.authorization(credential, secret)

    def ask(
        self, method: str, path: str, *, query: dict[str, str] | None = None, body: Any = None, bytes_max: int = -1
    ) -> bytes:
        """The body of the answer; with ``bytes_max`` only its beginning."""
        connection = http.client.HTTPSConnection(self._host, self._port, timeout=TIMEOUT_S, context=self._context)
        try:
            raw = None if body is None else msgspec.json.encode(body)
            target = f"{path}?{urlencode(query)}" if query else path
            try:
                connection.request(method, target, raw, {**self._headers, "Content-Type": "application/json"})
                answer = connection.getresponse()
                content = answer.read(None if bytes_max < 0 else bytes_max)
            except http.client.HTTPException as error:
                raise ConnectionError(f"the answer broke off: {error!r}") from error
            if answer.status >= 300:
                wire.raise_remote(msgspec.json.decode(content, type=dict[str, Any]))
            return content
        finally:
            connection.close()

    def get(self, kind: type[T], path: str, **query: str) -> T:
        return msgspec.json.decode(self.ask("GET", path, query=query), type=kind)

    def version(self) -> messages.VersionAnswer:
        return self.get(messages.VersionAnswer, messages.VERSION)

    def add_machine(self, name: str) -> messages.TokenAnswer:
        answer = self.ask("POST", messages.MACHINES, body=messages.NewMachine(name=name))
        return msgspec.json.decode(answer, type=messages.TokenAnswer)

    def protect(self, name: str, disks: tuple[str, ...]) -> None:
        self.ask(
            "PUT", messages.PROTECTION.format(name=name), body=messages.ProtectRequest(disks=disks, quiesce="none")
        )

    # --- one machine ----------------------------------------------------------------------------------------------
    def state(self, machine: uuid.UUID) -> wire.MachineState:
        return self.get(wire.MachineState, wire.MACHINE.format(machine=machine))

    def status(self, name: str) -> messages.MachineStatus:
        return self.get(messages.MachineStatus, messages.MACHINE.format(name=name))

    def feed(self, machine: uuid.UUID, after: Position, until: str) -> wire.FeedAnswer:
        return self.get(wire.FeedAnswer, wire.FEED.format(machine=machine), after=str(after), until=until, wait_s="0")

    def header(self, machine: uuid.UUID, position: Position) -> Header:
        path = wire.SEGMENT.format(machine=machine, generation=position.generation, seq=position.seq)
        return Header.unpack(self.ask("GET", path, bytes_max=HEADER_BYTES))

    def cursor(self, machine: uuid.UUID, consumer: str) -> Position | None:
        text = self.get(wire.CursorBody, wire.CURSOR.format(machine=machine, consumer=consumer)).position
        return None if text is None else Position.parse(text)

    def image(self, machine: uuid.UUID, at: Position, disk: int, offset: int, length: int) -> Segment:
        path = wire.IMAGE.format(machine=machine)
        query = {"at": str(at), "disk": str(disk), "offset": str(offset), "length": str(length)}
        return decode(self.ask("GET", path, query=query))
