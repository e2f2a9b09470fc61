"""Creating, opening and removing the pinned objects of a capture.

    <pin_dir>/ring control disks stamps           maps
              stamps_<slot>                       of each disk
              bio_queue rq_complete* bio_complete* mark    programs
              link_<program>                      what makes them run

They are made in ``<pin_dir>-partial`` (the file system allows no dots) and renamed as one: a capture exists whole or
not at all. An agent that dies before the rename leaves a partial directory, which the next one removes.
"""

from __future__ import annotations

import mmap
import os
import secrets
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

from cdp.agent.capture import kernel, layout, libbpf
from cdp.agent.capture.calibrate import calibrate
from cdp.agent.capture.control import Control
from cdp.agent.capture.devices import Device
from cdp.agent.capture.errors import CaptureMissing

MAPS = ("ring", "control", "disks", "stamps")
HOOKS = {"bio_queue": "block_bio_queue"} | {
    f"{program}{copy}": f"block_{program}" for program in ("rq_complete", "bio_complete") for copy in ("", "_1", "_2")
}
"""Program: tracepoint. Completions come in three copies, so that one runs whatever it interrupts (see the C source)."""
PROGRAMS = (*HOOKS, "mark")
_CONSTANTS = struct.Struct("<II")
_DISK = struct.Struct("<IIQQQ")
_WAKE_FRACTION = 8
"""The drainer is woken each time an eighth of the ring was produced: seven eighths are left for its waking up."""


class PinnedDisk:
    """A disk as the kernel side knows it."""

    def __init__(self, key: bytes, value: bytes) -> None:
        self.key = int.from_bytes(key, "little")
        self.slot, self.granule_shift, self.granules, self.size_bytes, self.diskseq = _DISK.unpack(value)

    @property
    def major(self) -> int:
        return self.key >> 32

    @property
    def minor(self) -> int:
        return self.key & 0xFFFFFFFF


def exists(pin_dir: Path) -> bool:
    return (pin_dir / "control").exists()


def create(pin_dir: Path, devices: Sequence[Device], ring_bytes: int) -> None:
    """Load, calibrate, pin and attach. Nothing is left behind on an error."""
    partial = pin_dir.with_name(pin_dir.name + "-partial")
    remove(partial)
    loaded = libbpf.Object(kernel.check_object())
    try:
        loaded.set_entries("ring", ring_bytes)
        page_shift = mmap.PAGESIZE.bit_length() - 1
        loaded.set_constants(_CONSTANTS.pack(kernel.check_features(), page_shift))
        loaded.load()
        vmemmap, page_offset = calibrate(loaded, devices[0])
        control = Control.initial(
            layout.ABI_VERSION, secrets.randbits(63) | 1, vmemmap, page_offset, ring_bytes // _WAKE_FRACTION
        )
        libbpf.update(loaded.map_fd("control"), bytes(4), control)
        partial.mkdir(parents=True, mode=0o700)
        for slot, device in enumerate(devices):
            add_disk(partial, {name: loaded.map_fd(name) for name in ("disks", "stamps")}, slot, device)
        for name in MAPS:
            libbpf.pin(loaded.map_fd(name), partial / name)
        for name in PROGRAMS:
            libbpf.pin(loaded.program_fd(name), partial / name)
        for name, tracepoint in HOOKS.items():
            libbpf.pin(loaded.attach(name, tracepoint), partial / f"link_{name}")
        partial.rename(pin_dir)
    except BaseException:
        remove(partial)
        raise
    finally:
        loaded.close()


def add_disk(directory: Path, fds: Mapping[str, int], slot: int, device: Device) -> None:
    """Start capturing one more disk. The entry in ``disks`` comes last: it is what makes the program look."""
    pinned = directory / f"stamps_{slot}"
    pinned.unlink(missing_ok=True)
    flags = libbpf.F_MMAPABLE | libbpf.F_INNER_MAP
    stamps = libbpf.create_array("stamps_of_disk", 8, device.granules, flags)
    try:
        libbpf.pin(stamps, pinned)
        libbpf.update(fds["stamps"], slot.to_bytes(4, "little"), stamps.to_bytes(4, "little"))
    finally:
        os.close(stamps)
    value = _DISK.pack(slot, device.granule_bytes.bit_length() - 1, device.granules, device.size_bytes, device.diskseq)
    libbpf.update(fds["disks"], device.key.to_bytes(8, "little"), value)


def open_maps(pin_dir: Path, names: Sequence[str]) -> dict[str, int]:
    """Descriptors of pinned objects. Raises ``CaptureMissing``."""
    if not exists(pin_dir):
        raise CaptureMissing(
            f"No capture is pinned in {pin_dir}.",
            remedy="The agent creates it when it starts; after a reboot that means a resync.",
            path=str(pin_dir),
        )
    fds: dict[str, int] = {}
    try:
        for name in names:
            fds[name] = libbpf.get(pin_dir / name)
    except BaseException:
        for fd in fds.values():
            os.close(fd)
        raise
    return fds


def disks(disks_fd: int) -> list[PinnedDisk]:
    """By slot."""
    found = [PinnedDisk(key, libbpf.lookup(disks_fd, key, _DISK.size)) for key in libbpf.keys(disks_fd, 8)]
    return sorted(found, key=lambda disk: disk.slot)


def remove(pin_dir: Path) -> None:
    """Unpin everything: links first, so that nothing runs half removed. Idempotent."""
    if not pin_dir.is_dir():
        return
    for entry in sorted(pin_dir.iterdir(), key=lambda entry: not entry.name.startswith("link_")):
        entry.unlink()
    pin_dir.rmdir()
