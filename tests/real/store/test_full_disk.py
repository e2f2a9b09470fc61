"""A real filesystem that fills while an agent pushes over HTTP: refused clearly, kept, gone on with by retention."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest

from cdp.agent.client import Client
from cdp.agent.push import Pusher
from cdp.agent.spool import Spool
from cdp.agent.status import Status
from cdp.server import messages as m
from cdp.server.config import Limits, Retention, StoreFiles
from cdp.server.retention_messages import RETENTION, RetentionPolicy
from cdp.store import ImageReader, verify
from journal.errors import CdpError
from journal.position import Position
from journal.segment import Header
from tests.harness import filesystem
from tests.harness.loop import LoopDisk, scratch_dir
from tests.harness.process import run
from tests.harness.wait import wait_until_async
from tests.server.running import Running, Writer, running

pytestmark = pytest.mark.real

DISK_BYTES = 128 << 20
SEGMENT_BYTES = 1 << 20
WRITTEN_BYTES = 8 << 20
"""All writes lie in so much of the machine's disk."""
SETTINGS = {
    "store": StoreFiles(file_bytes=8 << 20, map_bytes=1 << 28),
    "retention": Retention(interval_s=0.1),
    "limits": Limits(feed_wait_s_max=5.0),
}


@pytest.fixture
def small_disk() -> Iterator[Path]:
    work = scratch_dir("cdp-full-")
    disk = LoopDisk(work / "disk.img", DISK_BYTES)
    try:
        filesystem.make("ext4", disk.device)
        mount = work / "mnt"
        mount.mkdir()
        run(["mount", str(disk.device), str(mount)])
        try:
            yield mount
        finally:
            # Lazily: the chunk index stays mapped into memory for as long as anything refers to it.
            run(["umount", "--lazy", str(mount)])
    finally:
        disk.close()
        shutil.rmtree(work)


class Agent:
    """The agent's own spool, client and pusher, with a machine of which every image is known."""

    def __init__(self, work: Path, server: Running, machine: str, headers: dict[str, str], seed: int) -> None:
        ca = work / "ca.pem"
        ca.write_text(server.ca_pem)
        self.spool = Spool(work / "spool", 1 << 30)
        self.spool.open()
        self.status = Status(boot_id="boot")
        self.client = Client(server.url, machine, headers, ca)
        self.writer = Writer(machine)
        self.image = bytearray(WRITTEN_BYTES)
        self.images: dict[Position, bytes] = {}
        self.diverged: list[str] = []
        self._random = random.Random(seed)
        self.pusher = Pusher(
            self.spool,
            self.client,
            self.status,
            tip=lambda: self.writer.tip,
            superseded=self._never,
            diverged=self._diverged,
            addresses=lambda _: None,
            news=asyncio.Event(),
        )

    async def _never(self, _: object) -> None:
        raise AssertionError("superseded")

    async def _diverged(self, reason: str) -> None:
        self.diverged.append(reason)

    def seal(self) -> None:
        at = self._random.randrange(0, WRITTEN_BYTES - SEGMENT_BYTES, 4096)
        data = self._random.randbytes(SEGMENT_BYTES)
        self.image[at : at + len(data)] = data
        raw = self.writer.seal([(0, at, data)])
        self.images[self.writer.tip] = bytes(self.image)
        self.spool.publish(self.spool.put(Header.unpack(memoryview(raw)), raw))
        self.pusher.notify()

    @contextlib.asynccontextmanager
    async def pushing(self) -> AsyncIterator[None]:
        async with self.client:
            task = asyncio.create_task(self.pusher.run())
            try:
                yield
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    def refused(self) -> CdpError | None:
        return self.status.errors.get("push")


async def shown(server: Running) -> m.MachineStatus:
    return msgspec.convert(await server.operator.ask("GET", m.MACHINE.format(name="db1")), m.MachineStatus)


async def test_a_full_disk_over_http(small_disk: Path, tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    async with running(small_disk / "server", **SETTINGS) as server:
        machine, joined = await server.protected()
        headers = dict(joined.session.headers)
        agent = Agent(tmp_path, server, machine, headers, seed)
        store, key = server.server.store, uuid.UUID(machine)
        async with agent.pushing():
            while agent.refused() is None:
                agent.seal()
                await wait_until_async(lambda: not agent.spool.entries or agent.refused(), 20, "an answer")
            assert_full(agent.refused())
            assert agent.status.online and agent.status.state != "failed"
            full_at = agent.status.stored
            assert full_at is not None and full_at.seq > 60, "most of the disk is used"
            for _ in range(5):
                agent.seal()
            assert len(agent.spool.entries) == 6, "what is not acknowledged stays in the spool"
            now = await shown(server)
            assert any(problem.startswith("The store refuses") for problem in now.problems)
            assert store.live(key) == full_at

            # Less is to be kept: room comes back while the server runs, and the agent goes on by itself.
            policy = RetentionPolicy(keep_s=None, max_bytes=64 << 20)
            await server.operator.ask("PUT", RETENTION.format(name="db1"), policy)
            await wait_until_async(lambda: not agent.spool.entries, 60, "the agent going on")
            assert agent.refused() is None
            for _ in range(60):
                agent.seal()
                await wait_until_async(lambda: len(agent.spool.entries) < 4, 60, "storing")
            await wait_until_async(lambda: not agent.spool.entries, 60, "the rest")
            assert agent.diverged == []
        now = await shown(server)
        assert not any("store" in problem for problem in now.problems)
        assert store.usage(key).file_bytes <= 80 << 20
        check(server, agent)
    async with running(small_disk / "server", **SETTINGS) as server:
        assert server.server.store.live(key) == agent.writer.tip
        check(server, agent)


def assert_full(error: CdpError | None) -> None:
    assert error is not None
    assert (error.code, error.http_status, error.transient) == ("store-full", 507, True)
    assert "cdp retention set" in error.remedy


def check(server: Running, agent: Agent) -> None:
    """Every recovery point that is offered is the image that was written, and everything verifies."""
    store, key = server.server.store, agent.writer.machine
    points = store.recovery_points(key, 0, 2**63).points
    assert Position.parse(points[-1].position) == agent.writer.tip
    for point in points:
        position = Position.parse(point.position)
        with ImageReader(store, key, position) as image:
            assert image.read(0, 0, WRITTEN_BYTES) == agent.images[position]
    assert verify(store, key).clean
