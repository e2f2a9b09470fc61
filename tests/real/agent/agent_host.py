"""A protected machine on this host: loop disks, service addresses on the loopback device, the agent as a process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np

from cdp.agent import enrol
from cdp.server import messages as m
from cdp.store import ImageReader
from cdp.store.recover import recover
from journal.position import Position
from journal.wire import AgentReport, MachineState
from standby.takeover import address
from tests.harness.images import assert_equal
from tests.harness.loop import LoopDisk, drop_caches, scratch_dir
from tests.harness.process import Program
from tests.harness.wait import wait_until_async
from tests.server.running import Running, running

NAME = "db1"
DISK_BYTES = 48 << 20


class AgentHost:
    """``addresses`` are on ``lo``. The agent's hooks write to ``hook_log``."""

    def __init__(self, server: Running, directory: Path, segment_s: float) -> None:
        self.server = server
        self.directory = directory
        self._segment_s = segment_s
        self.disk = LoopDisk(directory / "disk.img", DISK_BYTES)
        number = uuid.uuid4().int
        self.addresses = [f"127.90.{number % 250}.{number // 250 % 250 + 1}/32", f"fd77:{number % 65536:x}::5/128"]
        self.hook_log = directory / "hooks"
        self.pin_dir = Path(f"/sys/fs/bpf/{directory.name}")
        self.machine = uuid.UUID(int=0)
        self._toml = directory / "agent.toml"
        self.agent = Program(
            "agent",
            [sys.executable, "-m", "cdp.cli.main", "agent", "run", "--config", str(self._toml)],
            directory,
        )

    async def join(self) -> None:
        await asyncio.to_thread(address.add, self.addresses, "lo")
        issued = await self.server.operator.ask("POST", m.MACHINES, {"name": NAME})
        self.machine = uuid.UUID(issued["machine"])
        self._toml.write_text(self._config())
        await asyncio.to_thread(
            enrol.join, self.server.url, issued["token"], state_dir=self.directory / "state", config_path=self._toml
        )

    async def start(self) -> None:
        await asyncio.to_thread(self.agent.start, supervised=True)
        hub = self.server.server.hub
        await wait_until_async(lambda: hub.is_connected(self.machine, "agent"), 30, "the agent's connection")

    async def protect(self) -> None:
        await self.server.operator.ask(
            "PUT", m.PROTECTION.format(name=NAME), {"service_addresses": self.addresses, "quiesce": "hooks"}
        )

    async def call(self, verb: str, deadline_s: float = 20.0, **args: Any) -> dict[str, Any]:
        return await self.server.server.hub.call(self.machine, "agent", verb, args, deadline_s)

    def report(self) -> AgentReport | None:
        report = self.server.server.hub.state(self.machine, "agent").report
        return report if isinstance(report, AgentReport) else None

    async def wait_state(self, state: str, deadline_s: float = 30.0) -> None:
        await wait_until_async(
            lambda: (report := self.report()) is not None and report.state == state, deadline_s, f"state {state}"
        )

    async def wait_recovery_point(self, deadline_s: float = 60.0) -> Position:
        """One that was sealed after now."""
        began_ns = time.time_ns()
        store = self.server.server.store
        await self.wait_state("following", deadline_s)

        def sealed() -> bool:
            point = store.last_recovery_point(self.machine)
            return point is not None and bool(store.recovery_points(self.machine, began_ns, time.time_ns()).points)

        await wait_until_async(sealed, deadline_s, "a recovery point of now")
        point = store.last_recovery_point(self.machine)
        assert point is not None
        return point

    def state(self) -> MachineState:
        return self.server.server.machines.wire_state(self.machine)

    async def held(self) -> list[str]:
        return sorted(await asyncio.to_thread(address.holds, self.addresses))

    def write(self, offset: int, data: bytes) -> None:
        """Through the page cache, and down to the disk."""
        fd = os.open(self.disk.device, os.O_WRONLY)
        try:
            os.pwrite(fd, data, offset)
            os.fsync(fd)
        finally:
            os.close(fd)

    def put_row(self, number: int) -> None:
        """All rows are one block: its content is the last one."""
        self.write(0, number.to_bytes(8, "big").ljust(4096))

    def row_at(self, position: Position) -> int:
        with ImageReader(self.server.server.store, self.machine, position) as image:
            return int.from_bytes(image.read(0, 0, 8), "big")

    def scribble(self, seed: int, count: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(count):
            length = int(rng.integers(1, 33)) * 4096
            self.write(int(rng.integers(0, (DISK_BYTES - length) // 512)) * 512, rng.bytes(length))

    async def check_equal(self, position: Position, what: str) -> None:
        """The image at ``position`` is what the disk holds now."""
        image = self.directory / "image"
        await asyncio.to_thread(recover, self.server.server.store, self.machine, 0, position, image)
        await asyncio.to_thread(drop_caches, self.disk.device)
        await asyncio.to_thread(assert_equal, image, self.disk.device, what)

    def lose_everything_volatile(self) -> None:
        """As a reboot does, of a stopped agent."""
        shutil.rmtree(self.pin_dir)
        shutil.rmtree(self.directory / "run")

    def close(self) -> None:
        self.agent.close()
        # Adopted or orphaned drainers are not children of the program; their command line is this host's alone.
        found = subprocess.run(["pgrep", "-f", str(self.pin_dir)], capture_output=True, text=True, check=False)
        for pid in found.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), 9)
        if self.pin_dir.exists():
            shutil.rmtree(self.pin_dir)
        address.remove(self.addresses, "lo")
        self.disk.close()

    def _config(self) -> str:
        return f"""
            server = "{self.server.url}"
            disks = ["{self.disk.device}"]
            state_dir = "{self.directory}/state"
            runtime_dir = "{self.directory}/run"
            mount_tmpfs = false
            segment_s = {self._segment_s}
            [capture]
            pin_dir = "{self.pin_dir}"
            [copy]
            mb_per_s_max = 0
            [quiesce]
            before = ["sh", "-c", "echo before >> {self.hook_log}"]
            after = ["sh", "-c", "echo after >> {self.hook_log}"]
            [metrics]
            port = 0
        """


@asynccontextmanager
async def agent_host(segment_s: float = 1.0) -> AsyncIterator[AgentHost]:
    """A server and a joined machine whose agent is not started yet."""
    directory = scratch_dir("cdp-agent-")
    try:
        async with running(directory / "server") as server:
            host = AgentHost(server, directory, segment_s)
            try:
                await host.join()
                yield host
            except BaseException:
                print(host.agent.log_tail())
                raise
            finally:
                await asyncio.to_thread(host.close)
    finally:
        shutil.rmtree(directory)
