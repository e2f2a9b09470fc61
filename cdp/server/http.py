"""What every handler shares: the gate (who may call), typed parameters, JSON in and out, errors as answers.

Nothing is reachable by accident: a route is either added through the ``Gate`` with the roles that may call it, or with
``open``, which is for joining only.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

import msgspec
from aiohttp import web

from cdp.server.auth import Authenticator, Principal, Role
from cdp.server.errors import BodyTooLarge
from journal.errors import BadRequest, CdpError, Unauthorized
from journal.position import Position

log = logging.getLogger(__name__)

JSON_BODY_BYTES_MAX: Final = 1 << 20
TEXT_CHARS_MAX: Final = 4096
PIECE_BYTES: Final = 256 << 10

T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

PRINCIPAL: Final = web.RequestKey("principal", Principal)


class Gate:
    """Adds routes that require a credential of one of ``roles``, and of the machine that the path names."""

    def __init__(self, app: web.Application, auth: Authenticator) -> None:
        self._app = app
        self._auth = auth

    def add(self, method: str, path: str, handler: Handler, *roles: Role) -> None:
        assert roles

        async def guarded(request: web.Request) -> web.StreamResponse:
            principal = self._auth.authenticate(request.headers.get("Authorization"))
            principal.require_role(*roles)
            if "{machine}" in path and principal.role != "operator":
                principal.require_machine(machine_id(request))
            request[PRINCIPAL] = principal
            return await handler(request)

        self._app.router.add_route(method, path, guarded)

    def open(self, method: str, path: str, handler: Handler) -> None:
        """A route without a credential."""
        self._app.router.add_route(method, path, handler)


@web.middleware
async def errors_as_answers(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Every error leaves as JSON of the same form; an unforeseen one is logged and told without its insides."""
    try:
        return await handler(request)
    except CdpError as error:
        return error_answer(error)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        return error_answer(BadRequest(f"{error.reason}.", remedy="See the API's documentation."), error.status)
    except (asyncio.CancelledError, ConnectionError):
        raise
    except Exception:
        log.exception("%s %s failed", request.method, request.path)
        return error_answer(CdpError("The server failed.", remedy="See the server's log; it is a bug, report it."))


def error_answer(error: CdpError, status: int | None = None) -> web.Response:
    headers = {"WWW-Authenticate": "Bearer"} if isinstance(error, Unauthorized) else None
    return web.Response(
        body=msgspec.json.encode(error.as_dict(), enc_hook=str),
        status=status or error.http_status,
        content_type="application/json",
        headers=headers,
    )


async def send_bytes(request: web.Request, raw: bytes | bytearray | memoryview) -> web.StreamResponse:
    """A binary answer in pieces, so that a slow reader holds one buffer of it and not two."""
    response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
    response.content_length = len(raw)
    await response.prepare(request)
    view = memoryview(raw)
    for start in range(0, len(raw), PIECE_BYTES):
        await response.write(view[start : start + PIECE_BYTES])
    await response.write_eof()
    return response


def answer(body: Any, status: int = 200) -> web.Response:
    """``body`` is anything that msgspec encodes."""
    return web.Response(body=msgspec.json.encode(body), status=status, content_type="application/json")


async def body_of(request: web.Request, kind: type[T]) -> T:
    """The request's JSON body, bounded and checked against ``kind``."""
    if (request.content_length or 0) > JSON_BODY_BYTES_MAX:
        raise _too_large()
    raw = bytearray()
    async for chunk in request.content.iter_any():
        raw += chunk
        if len(raw) > JSON_BODY_BYTES_MAX:
            raise _too_large()
    try:
        return msgspec.json.decode(raw or b"{}", type=kind)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise BadRequest(f"The body is not valid: {error}.", remedy="Upgrade the older side.") from None


def machine_id(request: web.Request) -> uuid.UUID:
    """The UUID in the path, in its one canonical form."""
    text = request.match_info["machine"]
    try:
        machine = uuid.UUID(text)
    except ValueError:
        machine = uuid.UUID(int=0)
    if str(machine) != text:
        raise BadRequest("The path does not name a machine by its UUID.", remedy="See 'cdp machines list --json'.")
    return machine


def query_text(request: web.Request, name: str, default: str | None = None) -> str:
    """A query parameter, which may come once only."""
    values = request.query.getall(name, [])
    if not values and default is not None:
        return default
    if len(values) != 1 or len(values[0]) > TEXT_CHARS_MAX:
        raise BadRequest(f"The parameter {name!r} has to be given once.", remedy="Correct the request.")
    return values[0]


def query_int(request: web.Request, name: str, low: int, high: int, default: int | None = None) -> int:
    return integer(query_text(request, name, None if default is None else str(default)), name, low, high)


def integer(text: str, name: str, low: int, high: int) -> int:
    """Decimal digits only, bounded before they are converted."""
    if not (1 <= len(text) <= 20 and text.isascii() and text.isdigit() and low <= int(text) <= high):
        raise BadRequest(f"The parameter {name!r} is not a number in {low}..{high}.", remedy="Correct the request.")
    return int(text)


def query_seconds(request: web.Request, name: str, high: float, default: float) -> float:
    text = query_text(request, name, str(default))
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise BadRequest(f"The parameter {name!r} is not a number of seconds.", remedy="Correct the request.")
    return min(value, high)


def query_position(request: web.Request, name: str) -> Position:
    return position(query_text(request, name), name)


def position(text: str, name: str) -> Position:
    try:
        return Position.parse(text)
    except ValueError:
        raise BadRequest(f"{name!r} is not a position.", remedy="Correct the request.") from None


def _too_large() -> BodyTooLarge:
    return BodyTooLarge(f"A body has at most {JSON_BODY_BYTES_MAX} bytes here.", remedy="Send less.")
