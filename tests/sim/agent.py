"""The agent as a process: the real spool and pusher; what seals is scripted, with the same order of durable steps."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from cdp.agent.dirty import Geometry
from cdp.agent.history import stands_on
from cdp.agent.push import Pusher
from cdp.agent.spool import Spool
from cdp.agent.state import Cursor
from cdp.agent.status import Status
from journal import wire
from journal.errors import CdpError
from journal.extent import SECTOR_BYTES
from journal.position import Position
from journal.segment import Flags
from tests.sim.faults import Dice, Died
from tests.sim.machine import Bits, Machine
from tests.sim.network import AgentLink
from tests.sim.process import Process

SPOOL_BYTES: Final = (96 << 10, 1 << 30, 1 << 30)


class Agent(Process):
    """``excused``: something happened after which the histories may not meet; otherwise a resync is an error."""

    def __init__(
        self, dice: Dice, model: Machine, link: AgentLink, directory: Path, *, pusher: type[Pusher] = Pusher
    ) -> None:
        super().__init__(dice)
        self.model = model
        self.link = link
        self._directory = directory
        self._spool_bytes = dice.random.choice(SPOOL_BYTES)
        self._pusher = pusher
        self.cursor: Cursor | None = None
        self.excused = False
        self.quiet = False
        self.resyncs = 0
        self._dirty = model.nothing()
        self._fenced = False
        self._rebooting = False

    @property
    def tip(self) -> Position | None:
        return None if self.cursor is None else self.cursor.position

    @property
    def clean(self) -> bool:
        """All that was written is sealed, and the last segment was a recovery point."""
        cursor = self.cursor
        if cursor is None or self._any_dirty() or cursor.raw != len(self.model.log):
            return False
        sealed = self.model.sealed.get(cursor.position)
        return sealed is not None and sealed.header.is_recovery_point

    def boot(self) -> list[Coroutine[Any, Any, None]]:
        self.spool = Spool(self._directory, self._spool_bytes)
        self.cursor = self.spool.open()
        self._dirty = self.model.nothing()
        self._fenced = False
        if self.cursor is not None:
            for disk, packed in self.cursor.dirty.items():
                count = len(self._dirty[disk])
                self._dirty[disk] = np.unpackbits(np.frombuffer(packed, np.uint8), count=count).astype(np.bool_)
        self.pusher = self._pusher(
            self.spool,
            self.link,
            Status(boot_id="simulated"),
            tip=lambda: self.tip,
            superseded=self._superseded,
            diverged=self._diverged,
            addresses=lambda _: None,
            news=asyncio.Event(),
        )
        return [self.pusher.run(), self._beat()]

    def reboot(self) -> None:
        """The machine restarts: the spool was in memory."""
        self.excused = self._rebooting = True
        self.kill()

    def died(self) -> None:
        if self._rebooting:
            self._rebooting = False
            shutil.rmtree(self._directory, ignore_errors=True)

    # --- history ------------------------------------------------------------------------------------------------------
    async def _superseded(self, state: wire.MachineState) -> None:
        self._fenced = self.pusher.paused = True

    async def _diverged(self, reason: str) -> None:
        assert self.excused or self.link.damaged, f"a resync without need: {reason}"
        self._begin(Position.parse((await self.link.state()).tip))

    def _begin(self, tip: Position) -> None:
        """Compare everything with the image at ``tip``, and go on there."""
        self.resyncs += 1
        self.spool.discard()
        if tip.is_genesis and tip.generation > 1 and self.dice.random.random() < 0.5:
            self.model.roll_back(tip)
        self._dirty = self.model.differing(tip)
        disks = [Geometry(index=n, size_bytes=size, granule_bytes=512) for n, size in enumerate(self.model.sizes)]
        now = len(self.model.log)
        self.cursor = Cursor(
            machine="", boot_id="", capture="", disks=disks, tip=str(tip), sealed_at_ns=0, raw=now, resume=now
        )
        self._commit(self.cursor)

    async def _try_lift(self) -> None:
        """Is the fence lifted? Then go on where the live generation stands on what was sealed, or compare."""
        state = await self.link.state()
        if state.fenced or self.cursor is None:
            return
        tip = Position.parse(state.tip)
        ours = self.cursor.position
        if tip != ours:
            if stands_on(self.link.machine, tip, ours):
                self.spool.acknowledged(ours)
                self._commit(msgspec.structs.replace(self.cursor, tip=str(tip)))
            else:
                self._begin(tip)
        self._fenced = self.pusher.paused = False
        self.pusher.notify()

    # --- sealing ------------------------------------------------------------------------------------------------------
    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            try:
                if self.cursor is None:
                    self._begin(Position.parse((await self.link.state()).tip))
                    self.pusher.notify()
                elif self._fenced:
                    await self._try_lift()
                    continue
            except CdpError:
                continue  # the server is away: the next second asks again
            if not (self.quiet and self.clean):
                self._seal_second()

    def _seal_second(self) -> None:
        assert self.cursor is not None
        rng = self.dice.random
        end = len(self.model.log)
        cuts = sorted({rng.randint(self.cursor.raw, end) for _ in range(rng.choice((0, 0, 0, 1, 2)))} - {end})
        for cut in (*cuts, end):
            self._seal(cut, final=cut == end)

    def _seal(self, end: int, *, final: bool) -> None:
        cursor, model = self.cursor, self.model
        assert cursor is not None
        if not self.spool.has_room(SECTOR_BYTES * 128):
            self._mark(model.touched(cursor.raw, end, lost_only=False))
            self._commit(msgspec.structs.replace(cursor, raw=end, resume=end))
            return
        self._mark(model.touched(cursor.raw, end, lost_only=True))
        fuzzy = self._any_dirty()
        copy = self._some_dirty() if final and fuzzy else None
        flags = (Flags.FUZZY if fuzzy else Flags.NONE) | (Flags.NONE if final else Flags.CONTINUES)
        header, raw = model.seal(cursor.position, cursor.raw, end, copy, flags)
        if self.dice.happens("agent-dies"):
            (self._directory / "00000001-torn.tmp").write_bytes(raw[: len(raw) // 2])
            raise Died("agent")
        entry = self.spool.put(header, raw)
        self.dice.die("agent-dies")
        if copy is not None:
            self._dirty = [bits & ~copied for bits, copied in zip(self._dirty, copy, strict=True)]
        self._commit(
            msgspec.structs.replace(
                cursor, tip=str(header.position), sealed_at_ns=header.sealed_at_ns, raw=end, resume=end
            )
        )
        self.dice.die("agent-dies")
        self.spool.publish(entry)
        self.dice.die("agent-dies")
        self.pusher.notify()

    def _commit(self, cursor: Cursor) -> None:
        dirty = {disk: np.packbits(bits).tobytes() for disk, bits in enumerate(self._dirty)}
        self.cursor = msgspec.structs.replace(cursor, dirty=dirty)
        self.model.committed.add(cursor.position)
        self.spool.commit(self.cursor)

    def _mark(self, touched: Bits) -> None:
        self._dirty = [bits | more for bits, more in zip(self._dirty, touched, strict=True)]

    def _any_dirty(self) -> bool:
        return any(bits.any() for bits in self._dirty)

    def _some_dirty(self) -> Bits:
        """What is copied in this second."""
        chosen = [bits.copy() for bits in self._dirty]
        if self.dice.random.random() < 0.5 and not self.dice.calm:
            for bits in chosen:
                bits[: self.dice.random.randrange(len(bits))] = False
        return chosen
