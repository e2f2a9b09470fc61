"""Another protected machine at the server of a plant, with disks that are copies of the plant's: no standby."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from cdp.agent import enrol
from journal.position import Position
from journal.proof import CHUNK_BYTES, ENTRY_BYTES
from tests.harness.client import Client
from tests.harness.loop import LoopDisk, drop_caches
from tests.harness.observed import Observed
from tests.harness.plant import Plant, drainers
from tests.harness.process import Program, run


class Twin(Observed):
    """``disks`` are there, and may be written to, before ``start``."""

    targets: Sequence[LoopDisk] = ()

    def __init__(self, plant: Plant, name: str, copy_mb_per_s: float) -> None:
        super().__init__()
        self._plant = plant
        self.name = name
        self.work_dir = plant.work_dir / name
        self.work_dir.mkdir()
        self.machine = uuid.UUID(int=0)
        self._toml = self.work_dir / "agent.toml"
        self._pin_dir = Path(f"/sys/fs/bpf/{plant.work_dir.name}-{name}")
        self._copy_mb_per_s = copy_mb_per_s
        self.disks: list[LoopDisk] = []
        for index, disk in enumerate(plant.disks):
            drop_caches(disk.device)
            backing = self.work_dir / f"disk{index}.img"
            run(["cp", "--sparse=always", str(disk.backing), str(backing)])
            self.disks.append(LoopDisk(backing, None))
        self.agent = Program(
            f"agent-{name}",
            [sys.executable, "-m", "cdp.cli.main", "agent", "run", "--config", str(self._toml)],
            plant.log_dir,
        )

    @property
    def client(self) -> Client:
        return self._plant.client

    def start(self) -> None:
        """Enrolled, protected, and its agent running when it returns; the seed has begun."""
        issued = self.client.add_machine(self.name)
        assert issued.machine is not None
        self.machine = uuid.UUID(issued.machine)
        devices = ", ".join(f'"{disk.device}"' for disk in self.disks)
        self._toml.write_text(f"""
            server = "{self._plant.url}"
            disks = [{devices}]
            state_dir = "{self.work_dir}/state"
            runtime_dir = "{self.work_dir}/run"
            mount_tmpfs = false
            [capture]
            pin_dir = "{self._pin_dir}"
            [copy]
            mb_per_s_max = {float(self._copy_mb_per_s)}
            [metrics]
            port = 0
        """)
        enrol.join(
            self._plant.url, issued.token, state_dir=self.work_dir / "state", config_path=self._toml, name=self.name
        )
        self.agent.start(supervised=True)
        self._wait(lambda: self.client.status(self.name).disks, 30, "the agent's report of its disks")
        self.client.protect(self.name, tuple(disk.device.name for disk in self.disks))

    def close(self) -> None:
        self.agent.close()
        for pid in drainers(self._pin_dir):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        shutil.rmtree(self._pin_dir, ignore_errors=True)
        for disk in self.disks:
            disk.close()

    # --- dedup --------------------------------------------------------------------------------------------------------
    def wait_prefill(self, deadline_s: float = 60.0) -> None:
        """Until something has been laid below this machine."""
        image = self._plant.work_dir / "server" / "store" / "base" / str(self.machine) / "1" / "0.img"
        self._wait(lambda: image.exists() and image.stat().st_blocks > 0, deadline_s, "a prefill under way")

    def asked_bytes(self) -> int:
        """What asking for all chunks takes, at most."""
        return sum(disk.size_bytes // CHUNK_BYTES * ENTRY_BYTES for disk in self.disks)


def sent_bytes(observed: Observed) -> int:
    """All segments of a machine, as they travelled."""
    at, total = Position.genesis(observed.machine, 1, None), 0
    while entries := observed.client.feed(observed.machine, at, "tip").entries:
        total += sum(entry.segment_bytes for entry in entries)
        at = Position.parse(entries[-1].position)
    return total


def wait_hints(plant: Plant, deadline_s: float = 120.0) -> None:
    """Until the server can find the chunks of the plant's machine."""
    path = plant.work_dir / "server" / "chunks" / f"{plant.machine}.chunks"
    plant._wait(path.exists, deadline_s, "hints of the first machine")


@contextlib.contextmanager
def twin(plant: Plant, name: str, *, copy_mb_per_s: float = 0) -> Iterator[Twin]:
    made = Twin(plant, name, copy_mb_per_s)
    try:
        yield made
    finally:
        made.close()
