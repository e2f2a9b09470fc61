"""Who may do what: one-time join tokens, credentials, roles.

    token       cdp1.<SHA-256 fingerprint of the CA>.<secret>     traded once, before it expires, for a credential
    credential  <id> and <secret>, shown as `Authorization: Bearer <id>.<secret>` with every request

    role        may
    agent       push, ask and report for its own machine
    pe          read, acknowledge and report for its own machine, while that machine's standby exists
    operator    everything under /v1/operator, and read any machine

Secrets are 256 random bits, so their plain SHA-256 is what is stored: there is nothing to guess. They are compared in
constant time and never logged. A token is marked used, durably, before its credential exists: a crash in between costs
a token, never a second credential.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import threading
import uuid
from collections.abc import Callable
from typing import Final, Literal, Protocol

import msgspec

from cdp.server.errors import TokenExpired, TokenForeign, TokenInvalid, TokenUsed
from journal.errors import Forbidden, Unauthorized
from journal.wire import JoinAnswer

Role = Literal["agent", "pe", "operator"]

TOKEN_PREFIX: Final = "cdp1"  # noqa: S105
SECRET_BYTES: Final = 32
HEADER_CHARS_MAX: Final = 256
"""Far above any valid credential; nothing longer is looked at."""
SPENT_TOKEN_KEPT_S: Final = 7 * 86400.0
"""How long a spent token is remembered, so that using it again is told apart from a wrong one."""

_TOKEN = re.compile(r"cdp1\.([0-9a-f]{64})\.([A-Za-z0-9_-]{43})")
_BEARER = re.compile(r"Bearer ((?:agent|pe|operator)-[0-9a-f]{16})\.([A-Za-z0-9_-]{43})")
_NO_HASH: Final = "0" * 64


class TokenRecord(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """``key``: the first half of the secret's hash, which is what the record is found by."""

    key: str
    secret_hash: str
    role: Role
    machine: uuid.UUID | None
    expires_at_s: float
    used_at_s: float | None = None


class CredentialRecord(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    id: str
    secret_hash: str
    role: Role
    machine: uuid.UUID | None
    name: str
    created_at_s: float


class Rows(Protocol):
    """A durable table of small rows: a change is durable before the call returns."""

    def put(self, key: str, value: bytes) -> None: ...
    def delete(self, key: str) -> bool: ...
    def items(self) -> dict[str, bytes]: ...


class Principal(msgspec.Struct, frozen=True):
    """Who is asking. ``machine`` is the UUID the credential is bound to, None for operators."""

    credential: str
    role: Role
    machine: uuid.UUID | None
    name: str

    def require_role(self, *roles: Role) -> None:
        if self.role not in roles:
            raise Forbidden(
                f"A credential of role {self.role!r} may not do this.",
                remedy=f"Use a credential of role {' or '.join(roles)}.",
                role=self.role,
            )

    def require_machine(self, machine: uuid.UUID) -> None:
        """Operators may look at any machine, everybody else at their own only."""
        if self.role != "operator" and self.machine != machine:
            raise Forbidden(
                "This credential belongs to another machine.",
                remedy="Check that the state directory was not copied from another machine; join again if it was.",
                role=self.role,
            )


class Authenticator:
    """All tokens and credentials, in memory and stored. Thread-safe; what issues or revokes blocks on the disk."""

    def __init__(self, tokens: Rows, credentials: Rows, fingerprint: str, clock: Callable[[], float]) -> None:
        self._token_rows = tokens
        self._credential_rows = credentials
        self._fingerprint = fingerprint
        self._clock = clock
        self._lock = threading.Lock()
        self._tokens = {key: msgspec.json.decode(raw, type=TokenRecord) for key, raw in tokens.items().items()}
        self._credentials = {
            key: msgspec.json.decode(raw, type=CredentialRecord) for key, raw in credentials.items().items()
        }

    def issue_token(self, role: Role, machine: uuid.UUID | None, lifetime_s: float) -> str:
        """A new join token; only its hash is kept. Machine tokens name a machine, operator tokens none."""
        assert (machine is None) == (role == "operator")
        secret = secrets.token_urlsafe(SECRET_BYTES)
        digest = _hash(secret)
        record = TokenRecord(
            key=digest[:32],
            secret_hash=digest,
            role=role,
            machine=machine,
            expires_at_s=self._clock() + lifetime_s,
        )
        with self._lock:
            self._forget_spent_tokens()
            self._token_rows.put(record.key, msgspec.json.encode(record))
            self._tokens[record.key] = record
        return f"{TOKEN_PREFIX}.{self._fingerprint}.{secret}"

    def join(self, token: str, role: Role, name: str) -> JoinAnswer:
        """Trade a token for a credential. Raises ``TokenInvalid``, ``-Used``, ``-Expired`` or ``-Foreign``."""
        match = _TOKEN.fullmatch(token)
        if match is None or not hmac.compare_digest(match[1], self._fingerprint):
            raise _invalid()
        digest = _hash(match[2])
        with self._lock:
            record = self._tokens.get(digest[:32])
            if not hmac.compare_digest(record.secret_hash if record else _NO_HASH, digest) or record is None:
                raise _invalid()
            if record.used_at_s is not None:
                raise TokenUsed(
                    "This join token has been used already.",
                    remedy="Make a new one with 'cdp machines token NAME'. If you did not use it, revoke the "
                    "machine's credentials: 'cdp machines revoke NAME'.",
                )
            if self._clock() >= record.expires_at_s:
                raise TokenExpired(
                    "This join token has expired.", remedy="Make a new one with 'cdp machines token NAME'."
                )
            if record.role != role:
                raise TokenForeign(
                    f"This join token is for role {record.role!r}, not {role!r}.",
                    remedy="Use 'cdp join' with a machine's token and 'cdp login' with an operator's.",
                    role=record.role,
                )
            used = msgspec.structs.replace(record, used_at_s=self._clock())
            self._token_rows.put(used.key, msgspec.json.encode(used))
            self._tokens[used.key] = used
            # A machine has one agent: whoever holds the old credential (a clone, a thief) is out from now on.
            self._revoke(record.machine, record.role)
            return self._issue(record.role, record.machine, name)

    def issue(
        self,
        role: Role,
        machine: uuid.UUID | None,
        name: str,
        *,
        replace: bool = False,
        hand_over: Callable[[JoinAnswer], None] = lambda _: None,
    ) -> JoinAnswer:
        """A credential without a token: for the PE that the server itself starts, and for the first operator.

        ``replace`` ends the machine's older credentials of that role; ``hand_over`` is given the credential before it
        becomes valid."""
        with self._lock:
            if replace:
                self._revoke(machine, role)
            return self._issue(role, machine, name, hand_over)

    def authenticate(self, header: str | None) -> Principal:
        """The holder of the credential in an ``Authorization`` header. Raises ``Unauthorized``."""
        match = _BEARER.fullmatch(header) if header is not None and len(header) <= HEADER_CHARS_MAX else None
        if match is None:
            raise Unauthorized("No valid credential was shown.", remedy="Join first: 'cdp join' or 'cdp login'.")
        record = self._credentials.get(match[1])
        if not hmac.compare_digest(record.secret_hash if record else _NO_HASH, _hash(match[2])) or record is None:
            raise Unauthorized(
                "The credential is not known to this server.",
                remedy="It was revoked, or belongs to another server. Join again with a new token.",
            )
        return Principal(record.id, record.role, record.machine, record.name)

    def is_current(self, principal: Principal) -> bool:
        """Has the credential not been revoked since it was shown? For connections that stay open."""
        return principal.credential in self._credentials

    def has_operator(self) -> bool:
        return any(record.role == "operator" for record in self._credentials.values())

    def revoke(self, machine: uuid.UUID | None, role: Role) -> int:
        """End the machine's credentials of that role; returns how many there were."""
        with self._lock:
            return self._revoke(machine, role)

    def forget_machine(self, machine: uuid.UUID) -> None:
        """End every credential and token of a machine that is being removed."""
        with self._lock:
            self._revoke(machine, "agent")
            self._revoke(machine, "pe")
            for key in [token.key for token in self._tokens.values() if token.machine == machine]:
                self._token_rows.delete(key)
                del self._tokens[key]

    def _issue(
        self,
        role: Role,
        machine: uuid.UUID | None,
        name: str,
        hand_over: Callable[[JoinAnswer], None] = lambda _: None,
    ) -> JoinAnswer:
        secret = secrets.token_urlsafe(SECRET_BYTES)
        record = CredentialRecord(
            id=f"{role}-{secrets.token_hex(8)}",
            secret_hash=_hash(secret),
            role=role,
            machine=machine,
            name=name,
            created_at_s=self._clock(),
        )
        joined = JoinAnswer(credential=record.id, secret=secret, machine=None if machine is None else str(machine))
        hand_over(joined)
        self._credential_rows.put(record.id, msgspec.json.encode(record))
        self._credentials[record.id] = record
        return joined

    def _revoke(self, machine: uuid.UUID | None, role: Role) -> int:
        """Operators are many and have no machine: theirs end one by one, never because another one joins."""
        if machine is None:
            return 0
        ended = [key for key, held in self._credentials.items() if held.machine == machine and held.role == role]
        for key in ended:
            self._credential_rows.delete(key)
            del self._credentials[key]
        return len(ended)

    def _forget_spent_tokens(self) -> None:
        horizon = self._clock() - SPENT_TOKEN_KEPT_S
        for key in [token.key for token in self._tokens.values() if token.expires_at_s < horizon]:
            self._token_rows.delete(key)
            del self._tokens[key]


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _invalid() -> TokenInvalid:
    return TokenInvalid(
        "This is not a join token of this server.",
        remedy="Copy the whole token as 'cdp machines add' printed it, and check the server's address.",
    )
