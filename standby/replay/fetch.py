"""The server over HTTPS: ``ports.Transport`` with aiohttp, trusting one CA only."""

from __future__ import annotations

import ssl
import uuid
from types import TracebackType
from typing import Any, Final

import aiohttp
import msgspec

from journal import wire
from journal.comparison import BODY_BYTES_MAX
from journal.errors import CdpError
from journal.extent import SECTOR_BYTES
from journal.position import DIGEST_BYTES, Position
from journal.segment import SEGMENT_BYTES_MAX
from standby.replay.ports import ServerUnreachable, T, Until

_CONNECT_S: Final = 5.0
_READ_S: Final = 30.0
"""Silence on a connection in the middle of an answer; the feed's own waiting comes on top."""
_MESSAGE_BYTES_MAX: Final = 16 << 20
"""Any JSON answer: a feed of a day's segments stays below."""

_FEED = msgspec.json.Decoder(wire.FeedAnswer)
_STATE = msgspec.json.Decoder(wire.MachineState)
_CURSOR = msgspec.json.Decoder(wire.CursorBody)


def tls_context(ca_pem: str) -> ssl.SSLContext:
    """A context that trusts the server's own CA and nothing else. Raises ``ssl.SSLError`` for a bad PEM."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=ca_pem)
    return context


class HttpTransport:
    """One machine's history on the server at ``server`` (``https://host:port``)."""

    def __init__(
        self, server: str, ca_pem: str, machine: uuid.UUID, *, consumer: str, credential: str, secret: str
    ) -> None:
        self._base = server.rstrip("/")
        self._names = {"machine": str(machine), "consumer": consumer}
        self._ssl = tls_context(ca_pem)
        self._headers = wire.authorization(credential, secret)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> HttpTransport:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=self._ssl, limit=8),
            headers=self._headers,
            # Segments are compressed already.
            auto_decompress=False,
            trust_env=False,
        )
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        assert self._session is not None
        await self._session.close()

    @property
    def session(self) -> aiohttp.ClientSession:
        """For the control channel, which goes to the same server with the same credential."""
        assert self._session is not None
        return self._session

    async def state(self) -> wire.MachineState:
        return _decode(_STATE, await self._ask("GET", wire.MACHINE))

    async def feed(self, after: Position, until: Until, wait_s: float) -> wire.FeedAnswer:
        query = {"after": str(after), "until": until, "wait_s": str(wait_s)}
        return _decode(_FEED, await self._ask("GET", wire.FEED, query=query, wait_s=wait_s))

    async def segment(self, position: Position) -> bytearray:
        names = {"generation": str(position.generation), "seq": str(position.seq)}
        return await self._ask("GET", wire.SEGMENT, names=names, bytes_max=SEGMENT_BYTES_MAX)

    async def image(self, at: Position, disk: int, offset: int, length: int) -> bytearray:
        query = {"at": str(at), "disk": str(disk), "offset": str(offset), "length": str(length)}
        return await self._ask("GET", wire.IMAGE, query=query, bytes_max=SEGMENT_BYTES_MAX)

    async def hashes(self, disk: int, offset: int, length: int, chunk: int) -> bytes:
        query = {"disk": str(disk), "offset": str(offset), "length": str(length), "chunk": str(chunk)}
        bytes_max = -(-length // SECTOR_BYTES) * DIGEST_BYTES
        return bytes(await self._ask("GET", wire.HASHES, query=query, bytes_max=bytes_max))

    async def comparison(self, comparison: str) -> bytearray:
        return await self._ask("GET", wire.COMPARISON, names={"comparison": comparison}, bytes_max=BODY_BYTES_MAX)

    async def cursor(self) -> Position | None:
        text = _decode(_CURSOR, await self._ask("GET", wire.CURSOR)).position
        return None if text is None else Position.parse(text)

    async def ack(self, position: Position) -> None:
        await self._put_cursor(str(position))

    async def forget(self) -> None:
        await self._put_cursor(None)

    async def _put_cursor(self, position: str | None) -> None:
        await self._ask("PUT", wire.CURSOR, body=msgspec.json.encode(wire.CursorBody(position=position)))

    async def _ask(
        self,
        method: str,
        path: str,
        *,
        names: dict[str, str] | None = None,
        query: dict[str, str] | None = None,
        body: bytes | None = None,
        wait_s: float = 0.0,
        bytes_max: int = _MESSAGE_BYTES_MAX,
    ) -> bytearray:
        """The body of a good answer. Raises ``ServerUnreachable`` or the error that the server answered with."""
        url = self._base + path.format(**self._names, **(names or {}))
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=_READ_S + wait_s)
        headers = {"Content-Type": "application/json"} if body is not None else None
        try:
            async with self.session.request(
                method, url, params=query, data=body, timeout=timeout, headers=headers, allow_redirects=False
            ) as answer:
                content = await _read(answer, bytes_max)
                if answer.status >= 300:
                    _raise(answer.status, content)
                return content
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise ServerUnreachable(
                f"The server at {self._base} does not answer: {error or type(error).__name__}.",
                remedy="Check that 'cdp server' runs and that the network leads there; we keep trying.",
                server=self._base,
            ) from error


async def _read(answer: aiohttp.ClientResponse, bytes_max: int) -> bytearray:
    """The whole body, in one buffer of its announced size. Raises ``ServerUnreachable`` if it is too long."""
    announced = answer.content_length
    if announced is not None and announced > bytes_max:
        raise _oversized(announced, bytes_max)
    content = bytearray(announced or 0)
    at = 0
    async for chunk in answer.content.iter_any():
        if at + len(chunk) > bytes_max:
            raise _oversized(at + len(chunk), bytes_max)
        # Grows the buffer only if no length was announced.
        content[at : at + len(chunk)] = chunk
        at += len(chunk)
    if at < len(content):
        raise aiohttp.ClientPayloadError(f"{at} of {len(content)} bytes came")
    return content


def _oversized(length: int, bytes_max: int) -> ServerUnreachable:
    return ServerUnreachable(
        f"The server's answer of {length} bytes is longer than {bytes_max}.",
        remedy="Server and standby have different versions: build the PE again with 'cdp pe build'.",
    )


def _raise(status: int, content: bytearray) -> None:
    try:
        body = msgspec.json.decode(content, type=dict[str, Any])
    except msgspec.DecodeError:
        body = None
    if body is not None and "code" in body:
        wire.raise_remote(body)
    raise ServerUnreachable(
        f"The server answered with HTTP status {status}.",
        remedy="See the server's log.",
        status=status,
    )


def _decode(decoder: msgspec.json.Decoder[T], content: bytearray) -> T:
    try:
        return decoder.decode(content)
    except msgspec.DecodeError as error:
        raise _Unreadable(
            f"The server's answer cannot be read: {error}.",
            remedy="Server and standby have different versions: build the PE again with 'cdp pe build'.",
        ) from error


class _Unreadable(CdpError):
    code = "answer-unreadable"
    http_status = 502
