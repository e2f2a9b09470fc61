"""What is kept of each machine's journal: the policies, what operators see of them, and the API.

A policy is a row of the store's ``settings``; a machine without one has the default of the configuration.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Final, Literal

import msgspec
from aiohttp import web

from cdp.server.errors import PolicyInvalid
from cdp.server.http import PRINCIPAL, Gate, answer, body_of
from cdp.server.retention_messages import RETENTION, RetentionPolicy, RetentionStatus
from cdp.server.upkeep import STANDBY, Upkeep
from cdp.server.workers import Workers
from cdp.store.horizon import Held

if TYPE_CHECKING:
    from cdp.store import Store, Usage

FILES_MIN: Final = 2
"""A journal is limited by whole files: the one that is being written, and one that can be given back."""

_POLICY: Final = msgspec.json.Decoder(RetentionPolicy)


class Policies:
    """Called from worker threads."""

    def __init__(self, store: Store, default: RetentionPolicy, file_bytes: int) -> None:
        self._store = store
        self._default = default
        self._file_bytes = file_bytes

    def of(self, machine: uuid.UUID) -> RetentionPolicy:
        own = self._own(machine)
        return self._default if own is None else own

    def is_default(self, machine: uuid.UUID) -> bool:
        return self._own(machine) is None

    def put(self, machine: uuid.UUID, policy: RetentionPolicy) -> None:
        """Raises ``PolicyInvalid``."""
        least = FILES_MIN * self._file_bytes
        if policy.max_bytes is not None and policy.max_bytes < least:
            raise PolicyInvalid(
                f"A journal is limited to {least} bytes at least: {FILES_MIN} files of {self._file_bytes} bytes.",
                remedy="Give a larger limit, or make 'store.file_bytes' of the server's configuration smaller.",
                least_bytes=least,
            )
        self._store.settings.put(_key(machine), msgspec.json.encode(policy))

    def reset(self, machine: uuid.UUID) -> None:
        self._store.settings.delete(_key(machine))

    def _own(self, machine: uuid.UUID) -> RetentionPolicy | None:
        raw = self._store.settings.get(_key(machine))
        return None if raw is None else _POLICY.decode(raw)


class Retentions:
    def __init__(self, store: Store, workers: Workers, policies: Policies, upkeep: Upkeep) -> None:
        self._store = store
        self._workers = workers
        self._policies = policies
        self._upkeep = upkeep

    def add_routes(self, gate: Gate) -> None:
        gate.add("GET", RETENTION, self.get, "operator")
        gate.add("PUT", RETENTION, self.put, "operator")
        gate.add("DELETE", RETENTION, self.reset, "operator")

    async def get(self, request: web.Request) -> web.StreamResponse:
        machine = (await self._workers.read(self._store.machine, request.match_info["name"])).uuid
        return answer(await self._workers.read(self._now, machine))

    async def put(self, request: web.Request) -> web.StreamResponse:
        machine = (await self._workers.read(self._store.machine, request.match_info["name"])).uuid
        policy = await body_of(request, RetentionPolicy)
        await self._workers.write(self._policies.put, machine, policy)
        details = {"policy": msgspec.json.encode(policy).decode()}
        return await self._changed(request, machine, "set retention", details)

    async def reset(self, request: web.Request) -> web.StreamResponse:
        machine = (await self._workers.read(self._store.machine, request.match_info["name"])).uuid
        await self._workers.write(self._policies.reset, machine)
        return await self._changed(request, machine, "reset retention", {})

    async def _changed(
        self, request: web.Request, machine: uuid.UUID, action: str, details: dict[str, str]
    ) -> web.StreamResponse:
        principal = request[PRINCIPAL]
        told = {"credential": principal.credential, "from": request.remote or "", **details}
        await self._workers.write(self._store.audit, principal.name, action, str(machine), told)
        self._upkeep.look()
        return answer(await self._workers.read(self._now, machine))

    def _now(self, machine: uuid.UUID) -> RetentionStatus:
        return self.status(machine, self._store.usage(machine))

    def status(self, machine: uuid.UUID, usage: Usage) -> RetentionStatus:
        policy = self._policies.of(machine)
        kept = self._upkeep.kept(machine)
        free, reserve = self._store.pool.room()
        rate = usage.recent_bytes / (usage.recent_ns / 1e9) if usage.recent_ns else None
        will_hold_s, limited_by = _forecast(policy, usage, rate, max(0, free - reserve))
        reason, remedy = ("", "") if kept.held_by is None else _told(kept.held_by)
        return RetentionStatus(
            policy=policy,
            is_default=self._policies.is_default(machine),
            holds_s=_span_s(usage.recoverable_from_ns, usage.newest_ns),
            bytes_per_s=rate,
            will_hold_s=will_hold_s,
            limited_by=limited_by,
            folding=kept.folding,
            folded_at_s=kept.folded_at_s,
            held_by=reason,
            remedy=remedy,
            error=None if kept.error is None else kept.error.as_dict(),
            store_free_bytes=free,
            folded_segments=kept.segments,
            freed_bytes=kept.freed_bytes,
            fold_s=kept.fold_s,
        )


def _forecast(
    policy: RetentionPolicy, usage: Usage, rate: float | None, room_bytes: int
) -> tuple[float | None, Literal["time", "bytes", "disk", ""]]:
    """How long the journal comes to be at ``rate``, and what limits it. The disk counts as if it were this machine's
    alone."""
    limits: list[tuple[float, Literal["time", "bytes", "disk", ""]]] = []
    if policy.keep_s is not None:
        limits.append((policy.keep_s, "time"))
    if rate:
        limits.append(((usage.file_bytes + room_bytes) / rate, "disk"))
        if policy.max_bytes is not None:
            limits.append((policy.max_bytes / rate, "bytes"))
    return min(limits, default=(None, ""))


def _told(held: Held) -> tuple[str, str]:
    """Why retention stops there, and what to do about it."""
    match held.kind, held.name:
        case "consumer", name if name == STANDBY:
            return (
                "The standby has not applied older seconds yet.",
                "Bring the standby back, or let retention go past it: 'cdp retention set NAME --past-standby'.",
            )
        case "consumer", name:
            return f"{name!r} still needs older seconds.", "It lets go by itself when it ends."
        case "bookmark", name:
            return f"The bookmark {name!r} holds an older second.", "Remove it, or do not let it hold any more."
        case _:
            return "An older second is being read.", "Wait until the recovery or comparison is done."


def _span_s(first_ns: int | None, last_ns: int | None) -> float | None:
    return None if first_ns is None or last_ns is None else (last_ns - first_ns) / 1e9


def _key(machine: uuid.UUID) -> str:
    return f"retention/{machine}"
