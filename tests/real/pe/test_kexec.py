"""From an empty disk to PostgreSQL answering: the PE boots, seeds, follows, prepares, and becomes the machine.

While it follows under load, its process is killed again and again: the disks end equal all the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
import uuid
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cdp.server import messages as m
from cdp.server.config import Tls
from deploy.lab import source_image
from deploy.lab.wheels import wheelhouse
from journal.wire import DiskInfo, StandbyReport
from standby.pe.image import build
from standby.spec import StandbySpec
from standby.target.config_disk import encode
from tests.harness.wait import wait_until_async
from tests.real.pe.vm import INTERFACE, MAC, MANAGEMENT, SERVER, SERVICE, PeVm, free_port, segments_of, source_disk
from tests.server.running import Running, Writer, running

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]

KILLS = 10
LOAD_BYTES = 16 << 20
"""Behind the last partition: written to all the time, and nobody's."""
BLOCK = 4096


async def test_takeover_by_kexec(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target, config = tmp_path / "source.raw", tmp_path / "target.raw", tmp_path / "config.raw"
    base = await asyncio.to_thread(lambda: source_image.base_disk(wheelhouse(print), print))
    await asyncio.to_thread(source_disk, base, source)
    os.truncate(source, source.stat().st_size + LOAD_BYTES)
    with target.open("wb") as file:
        file.truncate(source.stat().st_size)
    image = await asyncio.to_thread(build)
    port = free_port()
    times: dict[str, float] = {}
    url = f"https://{SERVER}:{port}"
    async with running(tmp_path / "server", tls=Tls(names=(SERVER,)), port=port, url=url) as server:
        machine, writer, agent = await protected(server, source)
        for raw in await asyncio.to_thread(lambda: list(segments_of(source, writer))):
            server.server.store.put_segment(uuid.UUID(machine), raw)
        config.write_bytes(encode(server.target.configs[-1]))
        began = time.monotonic()
        with PeVm(image, target, config, tmp_path) as vm:
            key = uuid.UUID(machine)

            def report() -> StandbyReport | None:
                held = server.server.hub.state(key, "pe").report
                return held if isinstance(held, StandbyReport) else None

            def is_ready() -> bool:
                now = report()
                if now is not None and now.error is not None and now.state == "failed":
                    raise AssertionError(now.error)
                return now is not None and now.state == "ready" and now.kexec_ready

            await wait_until_async(lambda: report() is not None, 120, f"the PE's first report\n{vm.said()}")
            times["PE's first report"] = time.monotonic() - began
            stop = asyncio.Event()
            load = asyncio.create_task(live_on(server, agent, writer, source, stop))
            try:
                await wait_until_async(is_ready, 300, "readiness")
                times["ready"] = time.monotonic() - began
                await killed_again_and_again(server, key, vm)
                await wait_until_async(is_ready, 120, "readiness after the kills")
            except TimeoutError as error:
                raise AssertionError(f"{report()}\n{vm.said()[-4000:]}") from error
            finally:
                stop.set()
                await load
            times["ready after the kills"] = time.monotonic() - began
            now = report()
            if now is not None:
                times |= {"PE's CPU": now.cpu_s, "PE's resident MiB": now.resident_bytes / (1 << 20)}

            spec = msgspec.to_builtins(await asyncio.to_thread(server.server.machines.require_spec, key))
            began = time.monotonic()

            async def verb(name: str, **args: Any) -> dict[str, Any]:
                start = time.monotonic()
                answer = await server.server.hub.call(key, "pe", name, {"takeover": "t1", **args}, 60)
                times[name] = time.monotonic() - start
                return answer

            assert (await verb("drain", position=str(writer.tip)))["applied"] == str(writer.tip)
            assert target.read_bytes() == source.read_bytes()
            began = time.monotonic()
            injected, held = await asyncio.gather(
                verb("inject", spec=spec), verb("take_address", addresses=[f"{SERVICE}/24"], force=False)
            )
            assert held["held"] == [f"{SERVICE}/24"]
            assert not any("prepared again" in line for line in injected["injected"])
            await verb("finish_boot")
            try:
                await wait_until_async(lambda: vm.answer("select 1") == "1", 120, "PostgreSQL", poll_s=0.1)
            except TimeoutError as error:
                raise AssertionError(vm.said()[-6000:]) from error
            times["inject to PostgreSQL"] = time.monotonic() - began
            told = vm.answer(
                "select pg_read_file('/etc/cdp/takeover.json') || pg_read_file('/proc/cmdline')"
                " || pg_read_file('/proc/net/fib_trie') || pg_read_file('/proc/net/dev')"
            )
            assert told is not None
            assert '"t1"' in told
            assert MANAGEMENT.partition("/")[0] in told
            assert INTERFACE in told
            assert "sysctl.net.ipv4.conf.all.arp_notify=1" in told
            for command in ("systemd-analyze", "systemd-analyze critical-chain postgresql@15-main.service"):
                vm.answer(f"create table if not exists said (line text); copy said from program '{command}'")
            analysis = vm.answer("select line from said") or ""
            console = vm.said()
    with capsys.disabled():
        print(analysis)
        print("\n".join(line for line in console.splitlines() if "cdp" in line or "Run /init" in line))
        print({what: round(seconds, 2) for what, seconds in times.items()}, injected["injected"])


async def protected(server: Running, source: Path) -> tuple[str, Writer, Any]:
    machine, agent = await server.add_machine("db1")
    disk = DiskInfo(index=0, name="sda", size_bytes=source.stat().st_size)
    server.server.store.update_disks(uuid.UUID(machine), [disk])
    standby = StandbySpec(hypervisor="qemu:///system", bridge="br0", management_address=MANAGEMENT, gateway=SERVER)
    body = m.ProtectRequest(service_addresses=(f"{SERVICE}/24",), standby=standby)
    await server.operator.ask("PUT", m.PROTECTION.format(name="db1"), body)
    held = server.target.configs[-1]
    network = msgspec.structs.replace(held.network, mac=MAC)
    server.target.configs.append(msgspec.structs.replace(held, network=network))
    return machine, Writer(machine), agent


async def live_on(server: Running, agent: Any, writer: Writer, source: Path, stop: asyncio.Event) -> None:
    """The source writes behind its last partition, some segments a second, each a recovery point."""
    seed = int(os.environ.get("CDP_SEED", "0")) or random.randrange(1 << 32)
    print(f"CDP_SEED={seed}")
    rng = random.Random(seed)
    size = source.stat().st_size
    with source.open("r+b", buffering=0) as disk:
        while not stop.is_set():
            offsets = sorted(rng.sample(range(size - LOAD_BYTES, size, BLOCK), rng.randrange(1, 100)))
            writes = [(0, offset, rng.randbytes(BLOCK)) for offset in offsets]
            for _, offset, data in writes:
                os.pwrite(disk.fileno(), data, offset)
            raw = writer.seal(writes)
            await agent.put(str(writer.machine), writer.tip, raw)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), 0.2)


async def killed_again_and_again(server: Running, key: uuid.UUID, vm: PeVm) -> None:
    """Each time after it has applied something, at a random moment. It resumes without a person."""
    store = server.server.store
    for number in range(KILLS):
        before = store.cursor(key, "standby")
        await wait_until_async(lambda at=before: store.cursor(key, "standby") != at, 60, "replay to go on")  # type: ignore[misc]
        await asyncio.sleep(random.uniform(0, 1))  # the moment is the point
        await asyncio.to_thread(vm.kill_agent)
        await wait_until_async(lambda kills=number: vm.kills() > kills, 20, "the death of the agent")  # type: ignore[misc]
