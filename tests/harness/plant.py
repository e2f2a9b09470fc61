"""The whole data path on this host, from real parts, in processes of their own.

    loop disks ─► cdp agent (eBPF capture, drainer) ══TLS══► cdp server ══TLS══► standby.replay ─► loop disks

Everything has a name and a port of its own, lies in one scratch directory, restarts as systemd would restart it, and is
gone when the ``with`` block ends. On failure the ends of all logs are printed.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import secrets
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from cdp.agent import enrol
from cdp.agent.capture.layout import RING_BYTES
from cdp.server import messages
from cdp.server.auth import Authenticator
from cdp.server.tls import open_authority
from cdp.store import Store
from tests.harness.client import Client
from tests.harness.load import Churn
from tests.harness.loop import LoopDisk, scratch_dir
from tests.harness.mounts import MountNamespace
from tests.harness.observed import CONSUMER, NAME, Observed
from tests.harness.process import Program
from tests.harness.standby import StandbyConfig
from tests.harness.wait import wait_until

STORE_FILE_BYTES = 64 << 20
STORE_MAP_BYTES = 1 << 30


def new_seed() -> int:
    """A fresh seed, or the one in ``CDP_SEED``; printed, so that a failure can be played again."""
    seed = int(os.environ.get("CDP_SEED") or secrets.randbits(32))
    print(f"CDP_SEED={seed}")
    return seed


class Plant(Observed):
    """Started and stopped part by part; ``start_all`` does it in the usual order. Disks are zeros at first.

    ``disks`` are the protected devices, ``targets`` the standby's, by disk number. They are mounted in
    ``namespace``. ``agent_toml`` may be given before the enrolment: further sections of the agent's configuration.
    """

    def __init__(
        self,
        *,
        sizes: Sequence[int] = (256 << 20, 256 << 20),
        ring_bytes: int = RING_BYTES,
        spool_bytes: int = 256 << 20,
        copy_mb_per_s: float = 0,
        disk_dir: Path | None = None,
    ) -> None:
        """``disk_dir``: where the source's disks lie, if not beside everything else."""
        super().__init__()
        self.work_dir = scratch_dir("cdp-plant-")
        self.log_dir = self.work_dir / "log"
        self.log_dir.mkdir()
        self._runtime_dir = self.work_dir / "run"
        self.namespace = MountNamespace(self.log_dir)
        self.disks: list[LoopDisk] = []
        self.targets: list[LoopDisk] = []
        self.machine = uuid.UUID(int=0)
        self.agent_toml = ""
        self._sizes = sizes
        self._disk_dir = disk_dir or self.work_dir
        self._ring_bytes = ring_bytes
        self._spool_bytes = spool_bytes
        self._copy_mb_per_s = copy_mb_per_s
        self._port = _free_port()
        self._pin_dir = Path(f"/sys/fs/bpf/{self.work_dir.name}")
        self._churns: list[Churn] = []
        self._client: Client | None = None
        self.machine = uuid.UUID(int=0)
        self._agent_toml = self.work_dir / "agent.toml"
        self._server_toml = self.work_dir / "server.toml"
        self._standby_json = self.work_dir / "standby.json"
        self._server_toml.write_text(self._server_config())
        python = [sys.executable, "-m"]
        self.server = Program(
            "server",
            [*python, "cdp.cli.main", "server", "run", "--config", str(self._server_toml)],
            self.log_dir,
            ready=self._answers,
        )
        self.agent = Program(
            "agent", [*python, "cdp.cli.main", "agent", "run", "--config", str(self._agent_toml)], self.log_dir
        )
        self.replay = Program("replay", [*python, "tests.harness.standby", str(self._standby_json)], self.log_dir)

    # --- life -----------------------------------------------------------------------------------------------------
    def __enter__(self) -> Self:
        try:
            self.namespace.__enter__()
            for index, size in enumerate(self._sizes):
                self.disks.append(LoopDisk(self._disk_dir / f"disk{index}.img", size))
                self.targets.append(LoopDisk(self.work_dir / f"target{index}.img", size))
        except BaseException:
            self._clean_up()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            for log in sorted(self.log_dir.glob("*.log")):
                print(f"--- {log.name} ---\n" + "\n".join(log.read_text(errors="replace").splitlines()[-60:]))
        self._clean_up()

    def _clean_up(self) -> None:
        for program in (*(churn.program for churn in self._churns), self.replay, self.agent, self.server):
            program.close()
        with contextlib.suppress(ProcessLookupError):
            for pid in self._drainers():
                os.kill(pid, 9)
        self.namespace.__exit__(None, None, None)
        self.lose_capture()
        for disk in (*self.disks, *self.targets):
            disk.close()
        shutil.rmtree(self.work_dir)

    def start_all(self) -> None:
        """Everything runs when it returns; the seed has begun."""
        self.start_server()
        self.enrol()
        self.start_agent()
        self.protect()
        self.start_replay()

    def enrol(self) -> None:
        """The machine with its agent's and its standby's credentials. The server runs before and after."""
        token = self.client.add_machine(NAME)
        assert token.machine is not None
        self.machine = uuid.UUID(token.machine)
        self._agent_toml.write_text(self._agent_config())
        enrol.join(self.url, token.token, state_dir=self.work_dir / "state", config_path=self._agent_toml, name=NAME)
        self.server.stop()
        # The server puts a standby's credential into the PE's configuration disk; here there is no VM to carry it,
        # so it is issued by the same code into the closed store.
        with Store.open(self._server_dir / "store", file_bytes=STORE_FILE_BYTES, map_bytes=STORE_MAP_BYTES) as store:
            authority = open_authority(self._server_dir / "tls", datetime.datetime.now(datetime.UTC))
            auth = Authenticator(store.tokens, store.credentials, authority.fingerprint, time.time)
            standby = auth.issue("pe", self.machine, NAME)
        self._standby_json.write_bytes(
            msgspec.json.encode(
                StandbyConfig(
                    server=self.url,
                    ca_pem=self._operator.ca_pem,
                    machine=str(self.machine),
                    consumer=CONSUMER,
                    credential=standby.credential,
                    secret=standby.secret,
                    disks={index: str(target.device) for index, target in enumerate(self.targets)},
                )
            )
        )
        self.start_server()

    def protect(self) -> None:
        """As soon as the agent has told its disks."""
        self._wait(lambda: self.status().disks, 30, "the agent's report of its disks")
        self.client.protect(NAME, tuple(disk.device.name for disk in self.disks))

    def start_server(self) -> None:
        self.server.start(supervised=True)

    def start_agent(self) -> None:
        self.agent.start(supervised=True)

    def stop_agent(self) -> None:
        self.agent.stop()

    def start_replay(self) -> None:
        self.replay.start(supervised=True)

    def kill(self, victim: str) -> None:
        """SIGKILL one of agent, drainer, server, replay; it comes back by itself."""
        if victim != "drainer":
            {"agent": self.agent, "server": self.server, "replay": self.replay}[victim].kill()
            return
        wait_until(self._drainers, 30, "a drainer to kill", poll_s=0.005)
        for pid in self._drainers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)

    def lose_capture(self) -> None:
        """Detach the capture, as a reboot does: the programs go with the last pin."""
        if self._pin_dir.exists():
            shutil.rmtree(self._pin_dir)

    def check_no_crash(self) -> None:
        """Nothing ended that the test did not end."""
        for program in (self.server, self.agent, self.replay):
            assert not program.crashes, f"{program.name} ended by itself with {program.crashes}\n{program.log_tail()}"

    # --- disks -----------------------------------------------------------------------------------------------------
    def writes(self) -> int:
        """Write requests that the protected devices have completed."""
        return sum(_stat(disk.device)[4] for disk in self.disks)

    def written_bytes(self) -> int:
        return sum(_stat(disk.device)[6] * 512 for disk in self.disks)

    def spooled_bytes(self) -> int:
        return sum(path.stat().st_size for path in (self._runtime_dir / "spool").glob("*.segment"))

    # --- load -----------------------------------------------------------------------------------------------------
    def churn(self, name: str, seed: int, ops_per_s: float, mode: str) -> Churn:
        """A seeded load on all disks, not started yet. The disks must be quiet."""
        churn = Churn(name, seed, ops_per_s, mode, self.disks, self.work_dir, self.log_dir)
        self._churns.append(churn)
        return churn

    # --- inside ---------------------------------------------------------------------------------------------------
    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self._port}"

    @property
    def _server_dir(self) -> Path:
        return self.work_dir / "server"

    @property
    def _operator(self) -> messages.OperatorFile:
        """Written by the server at its first start."""
        return msgspec.json.decode((self._server_dir / "operator.json").read_bytes(), type=messages.OperatorFile)

    @property
    def client(self) -> Client:
        if self._client is None:
            operator = self._operator
            self._client = Client(self.url, operator.ca_pem, operator.credential, operator.secret)
        return self._client

    def _answers(self) -> bool:
        self.client.version()
        return True

    def _server_config(self) -> str:
        return f"""
            directory = "{self._server_dir}"
            listen = ["127.0.0.1"]
            port = {self._port}
            url = "{self.url}"
            [store]
            file_bytes = {STORE_FILE_BYTES}
            map_bytes = {STORE_MAP_BYTES}
        """

    def _agent_config(self) -> str:
        disks = ", ".join(f'"{disk.device}"' for disk in self.disks)
        return f"""
            server = "{self.url}"
            disks = [{disks}]
            state_dir = "{self.work_dir}/state"
            runtime_dir = "{self._runtime_dir}"
            mount_tmpfs = false
            [capture]
            ring_bytes = {self._ring_bytes}
            pin_dir = "{self._pin_dir}"
            [spool]
            bytes = {self._spool_bytes}
            [copy]
            mb_per_s_max = {float(self._copy_mb_per_s)}
            [metrics]
            port = 0
            {self.agent_toml}
        """

    def _drainers(self) -> list[int]:
        return drainers(self._pin_dir)


def drainers(pin_dir: Path) -> list[int]:
    """Process ids: the pin directory in the command line is one agent's alone."""
    found = []
    for directory in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            words = (directory / "cmdline").read_bytes() if directory.name.isdigit() else b""
            if b"cdp.agent.capture.drain" in words and str(pin_dir).encode() in words.split(b"\0"):
                found.append(int(directory.name))
    return found


def _stat(device: Path) -> list[int]:
    """The columns of /sys/block/*/stat."""
    return [int(word) for word in Path(f"/sys/block/{device.name}/stat").read_text().split()]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
