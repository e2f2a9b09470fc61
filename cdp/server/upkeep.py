"""Retention, all the time: one thread goes from machine to machine and folds what is older than its policy keeps.

    every ``interval_s``, at once while something is left:
      each machine: policy ─► one step of ``Store.retain`` ─► what came of it, for status and metrics

A step holds no lock that ingest waits for longer than one commit of the index; between its batches it leaves the disk
to ingest for as long as the batch took, the less the further the journal is past its limits.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import uuid
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from cdp.server.retention_messages import RetentionPolicy
from cdp.store.errors import UnknownMachine
from cdp.store.horizon import Held
from journal.errors import CdpError

if TYPE_CHECKING:
    from collections.abc import Callable

    from cdp.store import Store, Usage

log = logging.getLogger(__name__)

STANDBY: Final = "standby"
SLACK_SHARE: Final = 48
SLACK_S_MAX: Final = 900.0
"""So much more than ``keep_s`` is let run up before it is folded in one go: what is written again and again in that
time is folded once. Half an hour of a day would be a 48th; a quarter of an hour is enough."""
BEHIND: Final = 1.125
"""Past its limit by so much, a journal is folded without regard for ingest; on the way there with less and less."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What came of a machine's retention, up to now."""

    folding: bool = False
    folded_at_s: float | None = None
    held_by: Held | None = None
    error: CdpError | None = None
    segments: int = 0
    freed_bytes: int = 0
    fold_s: float = 0.0


class Upkeep:
    """``policy(machine)`` is asked before each step. Call ``start`` and ``close``; ``watch`` raises what ended the
    thread."""

    def __init__(
        self,
        store: Store,
        policy: Callable[[uuid.UUID], RetentionPolicy],
        *,
        interval_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._policy = policy
        self._interval_s = interval_s
        self._clock = clock
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._kept: dict[uuid.UUID, Kept] = {}
        self._thread = threading.Thread(target=self._run, name="retention", daemon=True)

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._thread.start()

    async def close(self) -> None:
        """A fold under way ends after its batch; the next start finishes it."""
        self._stopping.set()
        self._wake.set()
        await asyncio.to_thread(self._thread.join)

    async def watch(self) -> None:
        """Until the thread ends, which it does only by a defect or by ``close``."""
        await asyncio.shield(self._ended)

    def look(self) -> None:
        """A policy has changed: do not wait for the interval."""
        self._wake.set()

    def kept(self, machine: uuid.UUID) -> Kept:
        return self._kept.get(machine, Kept())

    def _run(self) -> None:
        failure: BaseException | None = None
        try:
            while not self._stopping.is_set():
                self._wake.clear()
                if not self.round():
                    self._wake.wait(self._interval_s)
        except BaseException as error:
            failure = error
        self._loop.call_soon_threadsafe(self._end, failure)

    def _end(self, failure: BaseException | None) -> None:
        if not self._ended.done():
            if failure is None:
                self._ended.set_result(None)
            else:
                self._ended.set_exception(failure)

    def round(self) -> bool:
        """A step for each machine; tells whether there is more to do at once."""
        machines = [machine.uuid for machine in self._store.list_machines()]
        self._kept = {machine: kept for machine, kept in self._kept.items() if machine in machines}
        more = [self._step(machine) for machine in machines if not self._stopping.is_set()]
        return any(more)

    def _step(self, machine: uuid.UUID) -> bool:
        policy = self._policy(machine)
        before = self.kept(machine)
        try:
            usage = self._store.usage(machine)
            limits = exceeded(policy, usage, self._clock())
            if limits is None:
                self._kept[machine] = replace(before, folding=False, held_by=None, error=None)
                return False
            began = time.monotonic()
            self._kept[machine] = replace(before, folding=True)
            done = self._store.retain(
                machine,
                keep_ns=limits.keep_ns,
                keep_bytes=limits.keep_bytes,
                now_ns=int(self._clock() * 1e9),
                past=(STANDBY,) if policy.past_standby else (),
                pause=lambda took_s: self._stopping.wait(took_s * limits.wait_share),
            )
        except UnknownMachine:
            return False  # it was removed meanwhile
        except CdpError as error:
            if before.error is None or before.error.code != error.code:
                log.warning("retention of %s: %s", machine, error)
            self._kept[machine] = replace(before, folding=False, error=error)
            return False
        self._kept[machine] = Kept(
            folding=done.more,
            folded_at_s=self._clock() if done.folded_to is not None else before.folded_at_s,
            held_by=done.held_by,
            segments=before.segments + done.segments,
            freed_bytes=before.freed_bytes + max(0, done.freed_bytes),
            fold_s=before.fold_s + (time.monotonic() - began if done.folded_to is not None else 0.0),
        )
        return done.more


@dataclass(frozen=True, slots=True)
class Limits:
    """``wait_share``: of the time that a batch of folding took."""

    keep_ns: int | None
    keep_bytes: int | None
    wait_share: float


def exceeded(policy: RetentionPolicy, usage: Usage, now_s: float) -> Limits | None:
    """What ``retain`` is to be asked for; None: nothing, the journal is within its limits."""
    keep_ns = keep_bytes = None
    behind = 0.0
    if policy.keep_s is not None and usage.oldest_ns is not None:
        age_s = now_s - usage.oldest_ns / 1e9
        if age_s > policy.keep_s + min(policy.keep_s / SLACK_SHARE, SLACK_S_MAX):
            keep_ns = int(policy.keep_s * 1e9)
            behind = age_s / policy.keep_s
    if policy.max_bytes is not None and usage.file_bytes > policy.max_bytes:
        keep_bytes = policy.max_bytes
        behind = max(behind, usage.file_bytes / policy.max_bytes)
    if keep_ns is None and keep_bytes is None:
        return None
    return Limits(keep_ns, keep_bytes, max(0.0, min(1.0, (BEHIND - behind) / (BEHIND - 1))))
