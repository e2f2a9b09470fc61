"""Loop disks, a capture, a drainer and a model that is rebuilt from records: what the tests of the capture stand on."""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cdp.agent.capture import devices, layout
from cdp.agent.capture.devices import Device
from cdp.agent.capture.errors import SpoolMissing
from cdp.agent.capture.record import Records
from cdp.agent.capture.session import CaptureSession
from cdp.agent.capture.spool import Mark, RawSpool
from journal.extent import Kind
from tests.harness.loop import LoopDisk, drop_caches, scratch_dir
from tests.harness.wait import wait_until

MIB = 1 << 20
DEADLINE_S = 20


class Rig:
    """Everything is removed by ``close``, whatever state a test left it in."""

    def __init__(self) -> None:
        self.directory = scratch_dir("cdp-capture-")
        self.pin_dir = Path("/sys/fs/bpf") / f"cdp-test-{uuid.uuid4().hex[:12]}"
        self.spool_dir = self.directory / "raw"
        self.disks: list[LoopDisk] = []
        self.devices: list[Device] = []
        self.session: CaptureSession | None = None
        self.drainer: subprocess.Popen[bytes] | None = None
        self._spool: RawSpool | None = None

    def add_disk(self, size_bytes: int = 64 * MIB, **options: int) -> Path:
        disk = LoopDisk(self.directory / f"disk-{len(self.disks)}", size_bytes, spend_zeroing=False, **options)
        self.disks.append(disk)
        self.devices.append(devices.inspect(disk.device))
        return disk.device

    def attach(self, ring_bytes: int = layout.RING_BYTES, only: Sequence[Device] | None = None) -> CaptureSession:
        self.session = CaptureSession.attach(only or self.devices, self.pin_dir, ring_bytes)
        return self.session

    def start_drainer(self, spool_bytes: int = 1024 * MIB) -> None:
        where = ["--pin-dir", str(self.pin_dir), "--spool-dir", str(self.spool_dir)]
        module = [sys.executable, "-m", "cdp.agent.capture.drain"]
        self.drainer = subprocess.Popen([*module, *where, "--spool-bytes", str(spool_bytes)])

    def kill_drainer(self) -> None:
        assert self.drainer is not None
        self.drainer.kill()
        self.drainer.wait()

    @property
    def spool(self) -> RawSpool:
        if self._spool is None:
            wait_until(self._open_spool, DEADLINE_S, "the raw spool", 0.005)
        assert self._spool is not None
        return self._spool

    def _open_spool(self) -> bool:
        assert self.session is not None
        try:
            self._spool = RawSpool.open(self.spool_dir, self.session.capture_id)
        except SpoolMissing:
            return False
        return True

    def cut(self) -> Mark:
        """A mark after everything that was written so far."""
        now = time.monotonic_ns()

        def mark() -> Mark | None:
            self.spool.poke()
            return self.spool.find_mark(now)

        wait_until(mark, DEADLINE_S, "a mark", 0.005)
        found = self.spool.find_mark(now)
        assert found is not None
        return found

    def records(self, start: int = 0) -> Records:
        """All records from ``start`` up to now."""
        pieces = list(self.spool.read(start, self.cut().position))
        return np.concatenate(pieces) if pieces else np.empty(0, pieces[0].dtype if pieces else "V1")

    def content(self, disk: int = 0) -> bytes:
        """What the disk holds, past all caches."""
        drop_caches(self.disks[disk].device)
        return self.disks[disk].device.read_bytes()

    def close(self) -> None:
        if self.drainer is not None:
            self.drainer.kill()
            self.drainer.wait()
        if self._spool is not None:
            self._spool = None
        if self.session is not None:
            self.session.detach()
        for disk in self.disks:
            disk.close()
        shutil.rmtree(self.directory)


def fio(*options: str) -> list[str]:
    """A random O_DIRECT load. Overlapping writes in flight at once would have no order, on disk or in the ring."""
    return [
        "fio",
        "--ioengine=libaio",
        "--direct=1",
        "--rw=randwrite",
        "--norandommap",
        "--serialize_overlap=1",
        *options,
    ]


class Model:
    """The images of a machine's disks, rebuilt from records, one by one in ring order."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.images = [np.zeros(size, np.uint8) for size in sizes]

    def apply(self, records: Records, chosen: npt.NDArray[np.bool_] | None = None) -> None:
        wanted = np.isin(records["bio"], complete_bios(records))
        for record in records[wanted if chosen is None else wanted & chosen]:
            image = self.images[record["disk"]]
            start, length = int(record["offset"]), int(record["length"])
            data = record["payload"][:length] if record["op"] == Kind.DATA else 0
            image[start : start + length] = data

    def differing_granules(self, disk: int, content: bytes, granule_bytes: int) -> set[int]:
        different = np.flatnonzero(self.images[disk] != np.frombuffer(content, np.uint8))
        return set((different // granule_bytes).tolist())


def complete_bios(records: Records) -> npt.NDArray[np.uint64]:
    """Bios with their last record and without an abandoned one."""
    last = np.unique(records["bio"][(records["flags"] & layout.LAST) != 0])
    abandoned = np.unique(records["bio"][(records["flags"] & layout.ABANDONED) != 0])
    return np.setdiff1d(last, abandoned)


def write_direct(device: Path, offset: int, data: bytes, memory_shift: int = 0) -> None:
    """One O_DIRECT write from memory that begins ``memory_shift`` bytes behind a page boundary."""
    fd = os.open(device, os.O_WRONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, memory_shift + len(data)) as memory, memoryview(memory) as view:
            view[memory_shift:] = data
            with view[memory_shift:] as part:
                assert os.pwrite(fd, part, offset) == len(data)
    finally:
        os.close(fd)
