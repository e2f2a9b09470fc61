"""The server as the command line sees it: blocking HTTPS on one connection, with the operator's credential."""

from __future__ import annotations

import http.client
import os
import socket
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import quote, urlencode, urlsplit

import msgspec

from cdp.cli.errors import LoginMissing, ServerUnreachable
from cdp.server.messages import OperatorFile
from journal import wire
from journal.errors import CdpError

T = TypeVar("T")

CONNECT_S: Final = 10.0
ANSWER_S: Final = 120.0
"""Some acts wait for a hypervisor."""
FILE_NAME: Final = "operator.json"
SERVER_FILE: Final = Path("/var/lib/cdp-server") / FILE_NAME
"""On the server's own host root is an operator without logging in."""


class Client:
    """Raises ``ServerUnreachable``, or the typed error that the server answered with."""

    def __init__(self, server: str, ca_pem: str | None, headers: Mapping[str, str]) -> None:
        """``ca_pem`` None: no verification, only for fetching the CA that is then checked by its fingerprint."""
        parts = urlsplit(server if "//" in server else f"https://{server}")
        if parts.scheme != "https" or not parts.hostname:
            raise ServerUnreachable(
                f"{server!r} is not a server's address.", remedy="Give one like https://backup.example.com:7443."
            )
        self.server = f"https://{parts.netloc}"
        self._host, self._port = parts.hostname, parts.port or 443
        if ca_pem is None:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            self._context.check_hostname = False
            self._context.verify_mode = ssl.CERT_NONE
        else:
            self._context = ssl.create_default_context(cadata=ca_pem)
        self._headers = {**headers, "User-Agent": "cdp"}
        self.answer_s = ANSWER_S
        self._connection: http.client.HTTPSConnection | None = None

    def another(self) -> Client:
        """One of the same operator with a connection of its own, for another thread."""
        made = object.__new__(Client)
        made.__dict__ = {**self.__dict__, "_connection": None}
        return made

    def get(self, kind: type[T], path: str, /, **query: object) -> T:
        return self._decode(self.raw("GET", path, **query), kind)

    def send(self, method: str, path: str, body: msgspec.Struct | None, kind: type[T], **query: object) -> T:
        return self._decode(self.raw(method, path, body, **query), kind)

    def raw(self, method: str, path: str, body: msgspec.Struct | None = None, /, **query: object) -> bytes:
        """The body of a good answer."""
        target = path + ("?" + urlencode({key: str(value) for key, value in query.items()}) if query else "")
        data = None if body is None else msgspec.json.encode(body)
        headers = dict(self._headers)
        if data is not None:
            headers["Content-Type"] = "application/json"
        try:
            status, content = self._exchange(method, target, data, headers)
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise self._unreachable(error) from error
        if status >= 300:
            _raise(status, content)
        return content

    def read_into(self, into: memoryview, path: str, /, **query: object) -> None:
        """Fill ``into`` with the body of a good answer, which has to be just as long."""
        target = path + "?" + urlencode({key: str(value) for key, value in query.items()})
        try:
            status, content = self._exchange("GET", target, None, self._headers, into)
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise self._unreachable(error) from error
        if status >= 300:
            _raise(status, content)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _exchange(
        self, method: str, target: str, data: bytes | None, headers: dict[str, str], into: memoryview | None = None
    ) -> tuple[int, bytes]:
        """On the open connection, or on a new one: the server may have closed it while we were idle."""
        if self._connection is not None:
            try:
                return self._once(self._connection, method, target, data, headers, into)
            except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError):
                self.close()
                if method != "GET":
                    raise
        self._connection = http.client.HTTPSConnection(self._host, self._port, timeout=CONNECT_S, context=self._context)
        self._connection.connect()
        assert isinstance(self._connection.sock, socket.socket)
        self._connection.sock.settimeout(self.answer_s)
        return self._once(self._connection, method, target, data, headers, into)

    @staticmethod
    def _once(  # noqa: PLR0917 (what http.client wants, and where the body goes)
        connection: http.client.HTTPSConnection,
        method: str,
        target: str,
        data: bytes | None,
        headers: dict[str, str],
        into: memoryview | None,
    ) -> tuple[int, bytes]:
        connection.request(method, target, data, headers)
        answer = connection.getresponse()
        if into is None or answer.status >= 300:
            return answer.status, answer.read()
        done = 0
        while done < len(into) and (got := answer.readinto(into[done:])):
            done += got
        if done < len(into) or answer.read(1):
            raise http.client.IncompleteRead(b"", len(into) - done)
        return answer.status, b""

    def _decode(self, content: bytes, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(content, type=kind)
        except msgspec.DecodeError as error:
            raise ServerUnreachable(
                f"The answer of {self.server} cannot be read: {error}.",
                remedy="Is it a cdp server, of the same version as this command?",
            ) from error

    def _unreachable(self, error: OSError | http.client.HTTPException) -> ServerUnreachable:
        remedy = "Check the address, and that the server runs: 'systemctl status cdp-server' there."
        if isinstance(error, ssl.SSLCertVerificationError):
            remedy = "Put the name you dial into tls.names of the server, or log in again if its CA is a new one."
        return ServerUnreachable(f"{self.server} cannot be reached: {error or type(error).__name__}.", remedy=remedy)


def own_file() -> Path:
    """Where ``cdp login`` keeps this person's credential."""
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "cdp" / FILE_NAME


def connect() -> Client:
    """As the operator that ``find_credential`` finds. Raises ``LoginMissing``."""
    _, held = find_credential()
    return Client(held.server, held.ca_pem, wire.authorization(held.credential, held.secret))


def find_credential() -> tuple[Path, OperatorFile]:
    """Of $CDP_CREDENTIAL, of ``cdp login``, or of the server on this host; for $CDP_SERVER if that is set. Raises
    ``LoginMissing``."""
    given = os.environ.get("CDP_CREDENTIAL")
    for path in [Path(given)] if given else [own_file(), SERVER_FILE]:
        try:
            held = msgspec.json.decode(path.read_bytes(), type=OperatorFile)
        except (FileNotFoundError, PermissionError):
            continue
        except (OSError, msgspec.DecodeError) as error:
            raise LoginMissing(
                f"{path} is not an operator's credential: {error}.", remedy="Log in again: 'cdp login'."
            ) from error
        return path, msgspec.structs.replace(held, server=os.environ.get("CDP_SERVER") or held.server)
    raise LoginMissing(
        "You are not logged in to a server.",
        remedy="Run 'cdp login URL TOKEN' with a token from 'cdp operators token', or be root on the server's host.",
    )


def name_in(path: str, name: str, id_: str | None = None) -> str:
    """``path`` with a machine's name or a takeover's id in it, or with both."""
    return path.format(name=quote(name, safe=""), id=quote(name if id_ is None else id_, safe=""))


def _raise(status: int, content: bytes) -> None:
    try:
        body = msgspec.json.decode(content, type=dict[str, Any])
        wire.raise_remote(body)
    except msgspec.DecodeError:
        raise CdpError(f"The server answered with HTTP status {status}.", remedy="See its log.") from None
