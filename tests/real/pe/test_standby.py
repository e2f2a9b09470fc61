"""All of the PE but its kexec, natively: a real server, a loop disk, the control channel and the verbs."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cdp.server import messages as m
from journal.errors import DrainNotYet, NotInjected
from journal.wire import DiskInfo, StandbyReport
from standby.pe import mounts
from standby.pe.main import Standby
from standby.pe.partitions import expose
from standby.pe.system import MOUNT_POINT
from standby.replay.device import BlockDisk
from standby.replay.ports import DrainRefused
from standby.spec import StandbySpec
from tests.harness.process import run
from tests.harness.wait import wait_until_async
from tests.pe.tree import DISK_BYTES, make_disk, make_tree
from tests.real.pe.test_boot import MAC, Recorder
from tests.real.pe.vm import segments_of
from tests.server.running import Running, Writer, running

pytestmark = pytest.mark.real


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    image = tmp_path / "target"
    with image.open("wb") as file:
        file.truncate(DISK_BYTES)
    loop = Path(run(["losetup", "--find", "--show", "--partscan", str(image)]).strip())
    try:
        yield loop
    finally:
        with suppress(OSError):
            mounts.unmount(MOUNT_POINT, lazily=True)
        expose(loop, [])
        run(["losetup", "--detach", str(loop)])


class Plant:
    """A machine with a history on a server, and its standby."""

    def __init__(self, server: Running, machine: str, writer: Writer, target: Path, recorder: Recorder) -> None:
        self.server, self.machine, self.writer, self.target, self.recorder = server, machine, writer, target, recorder
        self.key = uuid.UUID(machine)

    def put(self, *writes: tuple[int, int, bytes]) -> None:
        self.server.server.store.put_segment(self.key, self.writer.seal(writes))
        self.server.server.changes.notify(self.key)

    def report(self) -> StandbyReport | None:
        held = self.server.server.hub.state(self.key, "pe").report
        return held if isinstance(held, StandbyReport) else None

    def state(self) -> str | None:
        now = self.report()
        return now.state if now else None

    async def verb(self, name: str, **args: Any) -> dict[str, Any]:
        return await self.server.server.hub.call(self.key, "pe", name, {"takeover": "t1", **args}, 30)

    @asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        disk = BlockDisk(self.target)
        standby = Standby(self.server.target.configs[-1], {0: disk}, MAC, self.recorder)
        task = asyncio.create_task(standby.run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            disk.close()

    async def until_ready(self) -> None:
        """The source's heartbeats go on meanwhile: each is an occasion to prepare."""

        def ready() -> bool:
            now = self.report()
            if now is None or now.state != "ready":
                self.put()
                return False
            return now.applied == str(self.writer.tip)

        await wait_until_async(ready, 60, "readiness", poll_s=0.5)


@asynccontextmanager
async def plant(tmp_path: Path, target: Path) -> AsyncIterator[Plant]:
    source = tmp_path / "source"
    await asyncio.to_thread(lambda: make_disk(make_tree(tmp_path / "tree"), source))
    async with running(tmp_path / "server") as server:
        machine, _ = await server.add_machine("db1")
        info = DiskInfo(index=0, name="sda", size_bytes=DISK_BYTES)
        server.server.store.update_disks(uuid.UUID(machine), [info])
        standby = StandbySpec(hypervisor="qemu:///system", bridge="br0", management_address="10.77.0.20/24")
        body = m.ProtectRequest(service_addresses=("10.77.0.100/24",), standby=standby)
        await server.operator.ask("PUT", m.PROTECTION.format(name="db1"), body)
        server.target.configs[-1] = msgspec.structs.replace(server.target.configs[-1], server=server.url)
        writer = Writer(machine)
        held = Plant(server, machine, writer, target, Recorder())
        for raw in segments_of(source, writer):
            server.server.store.put_segment(held.key, raw)
        yield held


async def test_drained_injected_aborted_and_following_again(tmp_path: Path, target: Path) -> None:
    source = tmp_path / "source"
    async with plant(tmp_path, target) as held:
        async with held.following():
            await held.until_ready()
            assert target.read_bytes() == source.read_bytes()
            assert len(held.recorder.loaded) == 1

            # A planned takeover: the position is that of the last segment, the next generation grows out of it.
            held.put((0, DISK_BYTES - 4096, b"last" * 1024))
            position = str(held.writer.tip)
            assert await held.verb("drain", position=position) == {"applied": position}
            assert await held.verb("drain", position=position) == {"applied": position}
            held.server.server.store.start_generation(held.key, held.writer.tip, "takeover t1")
            held.server.server.changes.notify(held.key)
            with pytest.raises(NotInjected):
                await held.verb("finish_boot")
            spec = msgspec.to_builtins(await asyncio.to_thread(held.server.server.machines.require_spec, held.key))
            injected = await held.verb("inject", spec=spec)
            assert "/etc/cdp/takeover.json" in injected["injected"]
            assert await held.verb("inject", spec=spec) == injected
            assert len(held.recorder.loaded) == 1, "what had been prepared is what is started"
            assert held.server.server.store.cursor(held.key, "standby") is None
            await wait_until_async(lambda: held.state() == "taking-over", 5, "the report of the takeover")
            assert (await held.verb("status"))["state"] == "drained"
            with pytest.raises(DrainRefused):
                await held.verb("drain", position=str(held.writer.tip.genesis(held.key, 9, None)))

            # Given up: what was injected must be gone again.
            await held.verb("abort")
            writer = Writer(held.machine, 2, held.writer.tip)
            held.writer = writer
            held.put((0, DISK_BYTES - 4096, b"more" * 1024))
            await held.until_ready()
        content = bytearray(source.read_bytes())
        content[DISK_BYTES - 4096 :] = b"more" * 1024
        assert target.read_bytes() == bytes(content)


async def test_a_pe_that_restarts_after_the_injection_starts_over_from_the_cut(tmp_path: Path, target: Path) -> None:
    async with plant(tmp_path, target) as held:
        cut = str(held.writer.tip)

        async def drained() -> None:
            async with asyncio.timeout(60):
                while True:
                    try:
                        assert await held.verb("drain", position=cut) == {"applied": cut}
                        return
                    except DrainNotYet:
                        await asyncio.sleep(0.05)

        spec = msgspec.to_builtins(await asyncio.to_thread(held.server.server.machines.require_spec, held.key))
        async with held.following():
            await held.until_ready()
            cut = str(held.writer.tip)
            await drained()
            held.server.server.store.start_generation(held.key, held.writer.tip, "takeover t1")
            injected = await held.verb("inject", spec=spec)
        assert target.read_bytes() != (tmp_path / "source").read_bytes()
        async with held.following():
            with pytest.raises(NotInjected):
                await held.verb("finish_boot")
            await drained()
            assert target.read_bytes() == (tmp_path / "source").read_bytes(), "the injection is gone"
            assert await held.verb("inject", spec=spec) == injected
            assert (await held.verb("status"))["injected"] == ["t1"]


async def test_a_restarted_pe_goes_on_and_a_lost_server_comes_back(tmp_path: Path, target: Path) -> None:
    async with plant(tmp_path, target) as held:
        async with held.following():
            await held.until_ready()
        for number in range(5):
            held.put((0, DISK_BYTES - 8192, bytes([number + 1]) * 4096))
            async with held.following():
                await held.until_ready()
                await held.server.server.hub.drop(held.key, "pe")
                held.put((0, DISK_BYTES - 4096, bytes([number + 1]) * 4096))
                await held.until_ready()
        assert target.read_bytes()[-8192:] == bytes([5]) * 8192
