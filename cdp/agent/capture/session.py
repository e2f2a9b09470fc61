"""``CaptureSession``: the handle on a pinned capture.

The kernel objects live in bpffs and outlive every process; a session is a view of them. What could not be recorded is
told by values that only ever grow, and that nobody clears:

    generation   raised by one *before* a loss stamps its granules
    stamps       per granule: the generation of the last loss in it
    stamped      raised by one *after* the stamps of a loss are visible

    complete  ⇔  stamped + wide losses that were spread == generation

A wide loss (a failed flush, a passthrough command, a range of more than 4096 granules) is noted by the kernel side in
one word per disk, because stamping a million granules does not belong into an interrupt. ``losses`` spreads it.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cdp.agent.capture import devices as devices_
from cdp.agent.capture import kernel, layout, libbpf, pins
from cdp.agent.capture.control import Cause, Control
from cdp.agent.capture.devices import SYSFS, Device
from cdp.agent.capture.errors import CaptureMismatch, DeviceMissing, DeviceOutOfLimits

_SPREAD_GRANULES = 1 << 16
"""Granules stamped by one run of the program: a few milliseconds."""
_PRODUCER_PAGE = mmap.PAGESIZE


@dataclass(frozen=True, slots=True)
class Losses:
    """``generation`` counts all losses so far. Unless ``complete``, some stamps are not visible yet: ask again."""

    generation: int
    complete: bool


@dataclass(frozen=True, slots=True)
class LossCounters:
    """By ``Cause.label``; only causes that happened. Bytes are 0 for losses whose range is unknown (the whole disk)."""

    events: dict[str, int]
    bytes: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.events.values())


class CaptureSession:
    """Not thread-safe; one per machine (it alone spreads wide losses)."""

    def __init__(self, pin_dir: Path, devices: Sequence[Device]) -> None:
        self._pin_dir = pin_dir
        self._devices = tuple(devices)
        self._fds = pins.open_maps(pin_dir, (*pins.MAPS, *pins.PROGRAMS))
        self._control = Control(self._fds["control"])
        self._ring = (
            mmap.mmap(self._fds["ring"], mmap.PAGESIZE),
            mmap.mmap(self._fds["ring"], mmap.PAGESIZE, prot=mmap.PROT_READ, offset=_PRODUCER_PAGE),
        )
        self._positions = [memoryview(page).cast("Q") for page in self._ring]
        self._stamps: dict[int, tuple[mmap.mmap, npt.NDArray[np.uint64]]] = {}

    @classmethod
    def attach(cls, devices: Sequence[Device], pin_dir: Path, ring_bytes: int = layout.RING_BYTES) -> CaptureSession:
        """Create the capture, or re-open the pinned one; ``devices[i]`` is disk ``i`` of every record.

        A pinned capture may have fewer disks (the others are added at the end of the list, ``reopened`` stays True),
        but not others: ``CaptureMismatch``. ``ring_bytes`` counts at creation only. The caller has checked the devices.
        """
        if ring_bytes & (ring_bytes - 1) or not layout.RING_BYTES_MIN <= ring_bytes <= layout.RING_BYTES_MAX:
            raise DeviceOutOfLimits(
                f"A ring of {ring_bytes} bytes is not possible.",
                remedy=f"Choose a power of two from {layout.RING_BYTES_MIN} to {layout.RING_BYTES_MAX}.",
                ring_bytes=ring_bytes,
            )
        devices_.check_group(devices)
        reopened = pins.exists(pin_dir)
        if not reopened:
            kernel.check_environment()
            kernel.ensure_bpffs(pin_dir)
            pins.create(pin_dir, devices, ring_bytes)
        session = cls(pin_dir, devices)
        try:
            session.reopened = reopened
            session._adopt()
        except BaseException:
            session.close()
            raise
        return session

    reopened: bool = False
    """The capture was there before this session: nothing was lost between the two."""

    def close(self) -> None:
        """Let go; the capture goes on."""
        for _, array in self._stamps.values():
            del array
        self._stamps.clear()
        for view in self._positions:
            view.release()
        for page in self._ring:
            page.close()
        self._control.close()
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def detach(self) -> None:
        """End the capture and remove it from the kernel. A drainer must be stopped by its owner."""
        pins.remove(self._pin_dir)
        self.close()

    # --- what is captured ---------------------------------------------------------------------------------------------
    @property
    def devices(self) -> tuple[Device, ...]:
        return self._devices

    @property
    def capture_id(self) -> int:
        """Another one means: another ring, positions from 0, and everything between the two captures is lost."""
        return self._control.capture_id

    @property
    def produced(self) -> int:
        """Ring position behind the newest record."""
        return self._positions[1][0]

    @property
    def consumed(self) -> int:
        """Ring position that the drainer has reached."""
        return self._positions[0][0]

    def disk_changed(self) -> dict[int, str]:
        """Disks that were resized, replaced or removed since they were attached: slot and what happened."""
        changed: dict[int, str] = {}
        for disk in pins.disks(self._fds["disks"]):
            try:
                now = devices_.from_sysfs(SYSFS, disk.major, disk.minor, self._devices[disk.slot].path)
            except DeviceMissing:
                changed[disk.slot] = "removed"
                continue
            if now.size_bytes != disk.size_bytes:
                changed[disk.slot] = f"resized from {disk.size_bytes} to {now.size_bytes} bytes"
            elif now.diskseq != disk.diskseq:
                changed[disk.slot] = "replaced by another disk"
        return changed

    # --- losses -------------------------------------------------------------------------------------------------------
    def losses(self) -> Losses:
        """The drop generation, and whether the stamps of all losses up to it are visible. Spreads wide losses."""
        control = self._control
        self._note_missed_runs()
        wide = control.wide_events
        if wide != control.wide_handled:
            # ``wide`` was read first: the words of these losses were set before they were counted.
            for disk in pins.disks(self._fds["disks"]):
                self._spread(disk, control.whole(disk.slot))
            control.wide_handled = wide
        stamped = control.stamped + control.wide_handled
        generation = control.generation
        return Losses(generation, stamped == generation)

    def drop_generation(self) -> int:
        return self.losses().generation

    @property
    def lost(self) -> LossCounters:
        causes = [cause for cause in Cause if self._control.lost_events()[cause]]
        events, lost_bytes = self._control.lost_events(), self._control.lost_bytes()
        return LossCounters(
            {cause.label: events[cause] for cause in causes}, {cause.label: lost_bytes[cause] for cause in causes}
        )

    def stamps(self, disk: int) -> npt.NDArray[np.uint64]:
        """One u64 per granule: the generation of the last loss in it, 0 for none. A live, read-only view; a copy that
        was made after ``losses()`` said complete holds every loss up to that generation."""
        if disk not in self._stamps:
            pinned = pins.open_maps(self._pin_dir, [f"stamps_{disk}"])
            fd = pinned[f"stamps_{disk}"]
            try:
                size = -(-self._devices[disk].granules * 8 // mmap.PAGESIZE) * mmap.PAGESIZE
                mapped = mmap.mmap(fd, size, prot=mmap.PROT_READ)
            finally:
                os.close(fd)
            self._stamps[disk] = (mapped, np.frombuffer(mapped, np.uint64, self._devices[disk].granules))
        return self._stamps[disk][1]

    def granule_bytes(self, disk: int) -> int:
        """A power of two."""
        return self._devices[disk].granule_bytes

    def mark_lost(self, disk: int, offset: int = 0, length: int = 0, cause: Cause = Cause.REQUESTED) -> None:
        """Stamp a range (length 0: the whole disk) as if its writes had been lost now."""
        libbpf.run(self._fds["mark"], self._devices[disk].key, offset, length, 0, cause)

    def _note_missed_runs(self) -> None:
        """The kernel does not run a program on top of itself. What such a bio wrote, and where, nobody knows."""
        missed = libbpf.recursion_misses(self._fds["bio_queue"])
        if missed == self._control.missed_handled:
            return
        for disk in range(len(self._devices)):
            self.mark_lost(disk, cause=Cause.MISSED_RUN)
        self._control.missed_handled = missed

    def _spread(self, disk: pins.PinnedDisk, generation: int) -> None:
        if not generation:
            return
        for first in range(0, disk.granules, _SPREAD_GRANULES):
            count = min(_SPREAD_GRANULES, disk.granules - first)
            libbpf.run(self._fds["mark"], disk.key, first, count, generation, 0)

    # --- re-opening ---------------------------------------------------------------------------------------------------
    def _adopt(self) -> None:
        """Check that what is pinned is ours, and add the disks that it lacks."""
        if self._control.abi != layout.ABI_VERSION:
            raise CaptureMismatch(
                f"The pinned capture has version {self._control.abi}, this agent needs {layout.ABI_VERSION}.",
                remedy="Detach it ('cdp agent detach') and start the agent: a resync follows.",
                pinned=self._control.abi,
            )
        pinned = pins.disks(self._fds["disks"])
        for disk in pinned:
            device = self._devices[disk.slot] if disk.slot < len(self._devices) else None
            if device is None or (device.key, device.size_bytes, device.diskseq) != (
                disk.key,
                disk.size_bytes,
                disk.diskseq,
            ):
                raise CaptureMismatch(
                    f"The pinned capture's disk {disk.slot} is {disk.major}:{disk.minor} with {disk.size_bytes} bytes, "
                    f"not {device.path if device else 'in the list'}.",
                    remedy="Detach it ('cdp agent detach') and start the agent: a resync follows.",
                    slot=disk.slot,
                )
        for slot in range(len(pinned), len(self._devices)):
            pins.add_disk(self._pin_dir, self._fds, slot, self._devices[slot])
