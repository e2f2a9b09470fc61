"""Running ``churn`` on a plant's disks, and finding any image in its history of states."""

from __future__ import annotations

import bisect
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tests.harness import churn
from tests.harness.churn import NOTE, SECTOR_BYTES, Operation, operations
from tests.harness.images import Bits, ranges_of, sectors_of
from tests.harness.loop import LoopDisk, drop_caches
from tests.harness.process import Program
from tests.harness.wait import wait_until

LATE_NS_MAX = 10**9
"""A cut may take in operations that began this long after its clock reading, no more."""


class Model:
    """The disks after the first ``done`` operations of a load, on top of what they held before it."""

    def __init__(self, seed: int, mode: str, base: list[bytearray]) -> None:
        self.disks = [np.frombuffer(disk, np.uint8) for disk in base]
        self.done = 0
        self._operations = operations(seed, mode, [len(disk) for disk in base])
        self.next: Operation = next(self._operations)
        """The operation that follows; it may be there in part."""

    def step(self) -> Operation:
        """Apply one more operation; returns it."""
        applied = self.next
        if applied.kind != "flush":
            span = slice(applied.offset, applied.offset + applied.length)
            self.disks[applied.disk][span] = 0 if applied.payload is None else np.frombuffer(applied.payload, np.uint8)
        self.next = next(self._operations)
        self.done += 1
        return applied


class Churn:
    """One run of the load. Made while the disks are quiet: what they hold then is the model's ground."""

    def __init__(
        self,
        name: str,
        seed: int,
        ops_per_s: float,
        mode: str,
        disks: Sequence[LoopDisk],
        work_dir: Path,
        log_dir: Path,
    ) -> None:
        self.started_ns = 0
        self._notes = work_dir / f"{name}.notes"
        devices = [str(disk.device) for disk in disks]
        for disk in disks:
            drop_caches(disk.device)
        self._model = Model(seed, mode, [bytearray(disk.device.read_bytes()) for disk in disks])
        self.program = Program(
            name, [sys.executable, churn.__file__, str(seed), str(ops_per_s), mode, str(self._notes), *devices], log_dir
        )

    def start(self) -> None:
        self.started_ns = time.monotonic_ns()
        self.program.start()

    def run_for(self, seconds: float) -> None:
        """Let it go on for that long: the load's length is what is asked for."""
        end = time.monotonic() + seconds
        wait_until(lambda: time.monotonic() >= end, 2 * seconds + 10, "the load's end", poll_s=0.005)

    def stop(self) -> None:
        assert self.program.running, self.program.log_tail()
        self.program.kill_for_good()

    @property
    def operations(self) -> int:
        """How many have ended so far."""
        return self._notes.stat().st_size // NOTE.size if self._notes.exists() else 0

    def explain(self, images: Sequence[Path], sealed_ns: int) -> int:
        """The number of operations after which the disks were as ``images``: a recovery point sealed at ``sealed_ns``
        of the monotonic clock. Call it in the order of time. AssertionError: they never were like that.
        """
        began, ended = self._read_notes()
        model = self._model
        least = bisect.bisect_left(ended, sealed_ns)
        most = bisect.bisect_right(began, sealed_ns + LATE_NS_MAX)
        assert model.done <= least, f"{model.done} operations were there before, {least} now"
        while model.done < least:
            model.step()
        held = [np.memmap(image, np.uint8, "r") for image in images]
        wrong = [sectors_of(disk != image) for disk, image in zip(model.disks, held, strict=True)]
        while not _only_in(wrong, model.next):
            assert model.done < most, self._complaint(wrong, least)
            step = model.step()
            sectors = slice(step.offset // SECTOR_BYTES, (step.offset + step.length) // SECTOR_BYTES)
            span = slice(step.offset, step.offset + step.length)
            wrong[step.disk][sectors] = sectors_of(model.disks[step.disk][span] != held[step.disk][span])
        return model.done

    def _read_notes(self) -> tuple[list[int], list[int]]:
        raw = self._notes.read_bytes()
        pairs = list(NOTE.iter_unpack(raw[: len(raw) // NOTE.size * NOTE.size]))
        return [began for began, _ in pairs], [ended for _, ended in pairs]

    def _complaint(self, wrong: list[Bits], least: int) -> str:
        first = [(disk, run) for disk, sectors in enumerate(wrong) for run in ranges_of(sectors)[:8]]
        return f"the image is no state between operations {least} and {self._model.done}; it differs at {first}"


def _only_in(wrong: list[Bits], operation: Operation) -> bool:
    """Does the image differ at most where the operation under way writes?"""
    for disk, sectors in enumerate(wrong):
        where = np.flatnonzero(sectors)
        if len(where) == 0:
            continue
        first, end = operation.offset // SECTOR_BYTES, (operation.offset + operation.length) // SECTOR_BYTES
        if disk != operation.disk or where[0] < first or where[-1] >= end:
            return False
    return True
