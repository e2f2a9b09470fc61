"""The way in: the CA certificate, trading a token for a credential, and the first operator.

Only these two routes need no credential. The CA certificate is public; whoever joins checks it against the fingerprint
in the token, so that a stranger in the middle gets nothing.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
from aiohttp import web

from cdp.server.auth import Authenticator, Role
from cdp.server.http import Gate, answer, body_of
from cdp.server.messages import OperatorFile, TokenAnswer
from cdp.server.tls import Authority, write_private
from cdp.server.workers import Workers
from journal import wire
from journal.errors import BadRequest

if TYPE_CHECKING:
    from cdp.store import Store

NAME_CHARS_MAX: Final = 253
"""The longest host name there is."""


class Joining:
    def __init__(
        self,
        store: Store,
        workers: Workers,
        auth: Authenticator,
        authority: Authority,
        *,
        url: str,
        token_lifetime_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._workers = workers
        self._auth = auth
        self._authority = authority
        self._url = url
        self._token_lifetime_s = token_lifetime_s
        self._clock = clock

    def add_routes(self, gate: Gate) -> None:
        gate.open("GET", wire.CA, self.ca)
        gate.open("POST", wire.JOIN, self.join)

    async def ca(self, _: web.Request) -> web.StreamResponse:
        return web.Response(text=self._authority.pem, content_type="application/x-pem-file")

    async def join(self, request: web.Request) -> web.StreamResponse:
        body = await body_of(request, wire.JoinRequest)
        if not 1 <= len(body.name) <= NAME_CHARS_MAX or not body.name.isprintable():
            raise BadRequest("The name of who joins is not a host or person's name.", remedy="Correct the request.")
        joined = await self._workers.write(self._join, body, request.remote or "")
        return answer(joined)

    def _join(self, body: wire.JoinRequest, remote: str) -> wire.JoinAnswer:
        joined = self._auth.join(body.token, body.role, body.name)
        details = {"role": body.role, "name": body.name, "from": remote, "credential": joined.credential}
        self._store.audit(body.name, "join", joined.machine or "", details)
        return joined

    def issue_token(self, role: Role, machine: uuid.UUID | None) -> TokenAnswer:
        """Blocks on the disk."""
        return TokenAnswer(
            token=self._auth.issue_token(role, machine, self._token_lifetime_s),
            machine=None if machine is None else str(machine),
            url=self._url,
            expires_at_s=self._clock() + self._token_lifetime_s,
        )


def ensure_first_operator(auth: Authenticator, store: Store, authority: Authority, path: Path, port: int) -> bool:
    """On a server without operators, issue a credential and write it to ``path`` for root; tells whether it did.

    Without the file nobody could ever get in, so it is the one secret that is kept on the server. File first: a crash
    before the credential is stored leaves a file that the next start replaces.
    """
    if auth.has_operator():
        return False

    def write(joined: wire.JoinAnswer) -> None:
        file = OperatorFile(
            server=f"https://localhost:{port}",
            ca_pem=authority.pem,
            credential=joined.credential,
            secret=joined.secret,
        )
        write_private(path, msgspec.json.format(msgspec.json.encode(file)))

    joined = auth.issue("operator", None, "first operator", hand_over=write)
    store.audit("server", "first operator credential written", "", {"credential": joined.credential})
    return True
