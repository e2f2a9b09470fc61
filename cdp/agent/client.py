"""The server as the agent sees it: state, segments, hashes. One connection pool, TLS with the server's own CA only."""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NoReturn, TypeVar

import aiohttp
import msgspec

from cdp.agent.errors import ServerUnreachable
from cdp.agent.rate import Bucket
from journal import wire
from journal.position import DIGEST_BYTES, Position

CHUNK_BYTES: Final = 256 << 10
"""Of an upload: measured best for CPU; the send buffer never holds more than a few."""
ANSWER_BYTES_MAX: Final = 1 << 20
CONNECT_S: Final = 5.0
REQUEST_S: Final = 60.0
"""Without an answer for this long the connection counts as dead."""

_StructT = TypeVar("_StructT", bound=msgspec.Struct)


class Client:
    """All methods raise ``ServerUnreachable`` (transient) or the typed error that the server answered."""

    def __init__(self, server: str, machine: str, headers: dict[str, str], ca_file: Path) -> None:
        self.machine = machine
        self._base = server.rstrip("/")
        self._headers = headers
        self._tls = tls_context(ca_file) if self._base.startswith("https://") else None
        self._session: aiohttp.ClientSession | None = None
        self.bucket = Bucket(None)
        """The server's limit: told with each state and each acknowledgement."""

    async def __aenter__(self) -> Client:
        self._session = aiohttp.ClientSession(
            headers=self._headers,
            connector=aiohttp.TCPConnector(ssl=self._tls if self._tls is not None else True, limit=4),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=REQUEST_S),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def state(self) -> wire.MachineState:
        raw = await self._request("GET", wire.MACHINE.format(machine=self.machine))
        found = _decode(raw, wire.MachineState)
        self.bucket.set_rate(found.bytes_per_s_max)
        return found

    async def put_segment(self, position: Position, path: Path, length: int) -> wire.StoredAnswer:
        """Stream a sealed segment from its file."""
        where = wire.SEGMENT.format(machine=self.machine, generation=position.generation, seq=position.seq)
        raw = await self._request(
            "PUT", where, data=_stream(path, self.bucket), headers={"Content-Length": str(length)}
        )
        answer = _decode(raw, wire.StoredAnswer)
        self.bucket.set_rate(answer.bytes_per_s_max)
        return answer

    async def hashes(self, disk: int, offset: int, length: int, chunk: int) -> list[bytes]:
        """The digests of the newest image, one per ``chunk`` bytes of the range, the last one maybe of less."""
        query = {"disk": str(disk), "offset": str(offset), "length": str(length), "chunk": str(chunk)}
        raw = await self._request("GET", wire.HASHES.format(machine=self.machine), query=query)
        want = -(-length // chunk)
        if len(raw) != want * DIGEST_BYTES:
            raise _strange(f"{len(raw)} bytes of hashes for {want} chunks")
        return [raw[at : at + DIGEST_BYTES] for at in range(0, len(raw), DIGEST_BYTES)]

    async def begin_prefill(self) -> bytes:
        """The key of the proofs (``journal/proof.py``)."""
        raw = await self._request("POST", wire.PREFILL.format(machine=self.machine))
        return bytes.fromhex(_decode(raw, wire.PrefillBegun).key)

    async def prefill(self, key: bytes, disk: int, body: bytes) -> int:
        """Ask for the chunks in ``body``; how many of them the server has laid below this machine's image."""
        query = {"key": key.hex(), "disk": str(disk)}
        await self.bucket.take(len(body))
        raw = await self._request("PUT", wire.PREFILL.format(machine=self.machine), query=query, data=body)
        return _decode(raw, wire.PrefillLaid).chunks

    async def end_prefill(self) -> wire.PrefillEnded:
        raw = await self._request("DELETE", wire.PREFILL.format(machine=self.machine))
        return _decode(raw, wire.PrefillEnded)

    async def lost(self, position: Position) -> None:
        """The server has acknowledged ``position``, or what came before it, and does not know it any more."""
        body = msgspec.json.encode(wire.LostBody(acknowledged=str(position)))
        await self._request("POST", wire.LOST.format(machine=self.machine), data=body)

    async def put_comparison(self, comparison: str, body: bytes) -> None:
        """What the disks hold at a position (``journal/comparison.py``)."""
        where = wire.COMPARISON.format(machine=self.machine, comparison=comparison)
        await self._request("PUT", where, data=_pieces(body, self.bucket), headers={"Content-Length": str(len(body))})

    async def bookmark(self, request: wire.BookmarkRequest) -> wire.BookmarkInfo:
        """Answered when the bookmark is there."""
        raw = await self._request(
            "POST",
            wire.BOOKMARKS.format(machine=self.machine),
            data=msgspec.json.encode(request),
            patience_s=request.wait_s + REQUEST_S,
        )
        return _decode(raw, wire.BookmarkInfo)

    async def control(self) -> aiohttp.ClientWebSocketResponse:
        """The control channel, freshly opened."""
        try:
            return await self._open_session().ws_connect(
                self._base + wire.CONTROL, heartbeat=5.0, max_msg_size=ANSWER_BYTES_MAX, compress=0
            )
        except aiohttp.WSServerHandshakeError as error:
            if error.status in (401, 403):
                raise wire.RemoteError(
                    f"The server refuses the control channel ({error.status}).",
                    remedy="The credential may have been revoked: enrol again with 'cdp join'.",
                ) from error
            raise _unreachable(self._base, error) from error
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise _unreachable(self._base, error) from error

    def _open_session(self) -> aiohttp.ClientSession:
        assert self._session is not None, "use the client as a context manager"
        return self._session

    async def _request(
        self,
        method: str,
        path: str,
        *,
        query: dict[str, str] | None = None,
        data: AsyncIterator[memoryview] | bytes | None = None,
        headers: dict[str, str] | None = None,
        patience_s: float = REQUEST_S,
    ) -> bytes:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=patience_s)
        try:
            async with self._open_session().request(
                method, self._base + path, params=query, data=data, headers=headers, timeout=timeout
            ) as answer:
                raw = await _read(answer)
                if answer.status >= 300:
                    raise_answer(answer.status, raw)
                return raw
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise _unreachable(self._base, error) from error


def tls_context(ca_file: Path) -> ssl.SSLContext:
    """Trust exactly this CA, nothing that the system trusts."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cafile=str(ca_file))
    return context


def raise_answer(status: int, raw: bytes) -> NoReturn:
    """Raise the error that an answer carries; one without a body of ours counts as the server being away."""
    try:
        body: Any = json.loads(raw)
    except ValueError:
        body = None
    if isinstance(body, dict) and "code" in body:
        wire.raise_remote(body)
    raise _strange(f"status {status}")


async def _read(answer: aiohttp.ClientResponse) -> bytes:
    raw = await answer.content.read(ANSWER_BYTES_MAX + 1)
    parts = [raw]
    total = len(raw)
    while raw:
        raw = await answer.content.read(ANSWER_BYTES_MAX + 1)
        parts.append(raw)
        total += len(raw)
        if total > ANSWER_BYTES_MAX:
            raise _strange("an answer that is too long")
    return b"".join(parts)


async def _pieces(body: bytes, bucket: Bucket) -> AsyncIterator[memoryview]:
    for at in range(0, len(body), CHUNK_BYTES):
        piece = memoryview(body)[at : at + CHUNK_BYTES]
        await bucket.take(len(piece))
        yield piece


async def _stream(path: Path, bucket: Bucket) -> AsyncIterator[memoryview]:
    # The spool is in memory or freshly written: reading it does not wait for a disk worth a thread.
    buffer = bytearray(CHUNK_BYTES)
    with path.open("rb", buffering=0) as file:
        while got := file.readinto(buffer):
            await bucket.take(got)
            # The transport may keep a reference to what it was given, so every chunk is a buffer of its own.
            yield memoryview(buffer)[:got]
            buffer = bytearray(CHUNK_BYTES)


def _decode(raw: bytes, kind: type[_StructT]) -> _StructT:
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.DecodeError as error:
        raise _strange(str(error)) from error


def _unreachable(server: str, error: BaseException) -> ServerUnreachable:
    return ServerUnreachable(
        f"{server} does not answer: {type(error).__name__} {error}.".replace(" .", "."),
        remedy="The agent goes on capturing and tries again; check the server and the network.",
    )


def _strange(what: str) -> ServerUnreachable:
    return ServerUnreachable(
        f"The server's answer makes no sense: {what}.", remedy="Check that server and agent have the same version."
    )
