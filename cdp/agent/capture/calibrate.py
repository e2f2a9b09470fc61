"""Where does the kernel keep page structures (vmemmap) and memory (the linear map)? Both move at every boot.

The program ``calibrate`` looks at a *read* of ours: a bio carries its page whichever way the data goes, so that nothing
is written to any disk. Before the read happens, our page holds a magic number and /proc/self/pagemap tells its frame:

    bio ─► bv_page ─► vmemmap = page - frame * sizeof(struct page)
    linear map: 1 GiB steps down from an address known to lie in it, until the magic shows up at frame << 12

Further pages, elsewhere in memory, then have to show their magic through what was learnt.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import secrets
import struct
import threading
from pathlib import Path

from cdp.agent.capture import libbpf
from cdp.agent.capture.devices import Device
from cdp.agent.capture.errors import CalibrationFailed

_CALIBRATION = struct.Struct("<QQIIIIQ16sQQQQ")
_LEARN, _VERIFY, _DONE = 1, 2, 0
_PAGES = 4
_ATTEMPTS = 8
"""A page may be migrated between looking it up and reading into it: then the magic is not found; try again."""
_FRAME_MASK = (1 << 55) - 1
_PRESENT = 1 << 63
_MADV_NOHUGEPAGE = 15


def calibrate(loaded: libbpf.Object, device: Device) -> tuple[int, int]:
    """``(vmemmap, page_offset)``, learnt by reading the device's first page. Raises ``CalibrationFailed``."""
    fd = os.open(device.path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    try:
        loaded.attach("calibrate", "block_bio_queue")
        for _ in range(_ATTEMPTS):
            learnt = _attempt(loaded.map_fd("calibrations"), fd, device)
            if learnt is not None:
                return learnt
    finally:
        loaded.detach()
        os.close(fd)
    raise CalibrationFailed(
        f"Reading {device.path} did not show where the kernel keeps memory.",
        remedy="The kernel needs CONFIG_SPARSEMEM_VMEMMAP and /proc/self/pagemap, and the device O_DIRECT.",
        path=str(device.path),
    )


def _attempt(map_fd: int, device_fd: int, device: Device) -> tuple[int, int] | None:
    namespace = Path("/proc/self/ns/pid").stat()
    vmemmap = page_offset = 0
    with mmap.mmap(-1, _PAGES * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages:
        pages.madvise(_MADV_NOHUGEPAGE)
        for number in range(_PAGES):
            magic = secrets.token_bytes(16)
            at = number * mmap.PAGESIZE
            pages[at : at + 16] = magic
            with memoryview(pages) as whole, whole[at : at + mmap.PAGESIZE] as page:
                request = _CALIBRATION.pack(
                    # the kernel's own encoding, which differs from stat's beyond minor 255
                    os.major(namespace.st_dev) << 20 | os.minor(namespace.st_dev),
                    namespace.st_ino,
                    threading.get_native_id(),
                    device.major,
                    device.minor,
                    _VERIFY if number else _LEARN,
                    _frame(page),
                    magic,
                    vmemmap,
                    page_offset,
                    0,
                    0,
                )
                libbpf.update(map_fd, bytes(4), request)
                os.preadv(device_fd, [page], 0)
            answer = _CALIBRATION.unpack(libbpf.lookup(map_fd, bytes(4), _CALIBRATION.size))
            state, vmemmap, page_offset, found = answer[5], answer[8], answer[9], answer[11]
            if state != _DONE or found != 1:
                return None
    return vmemmap, page_offset


def _frame(page: memoryview) -> int:
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
        pagemap.seek(address // mmap.PAGESIZE * 8)
        entry = int.from_bytes(pagemap.read(8), "little")
    frame = entry & _FRAME_MASK
    if not entry & _PRESENT or not frame:
        raise CalibrationFailed(
            "/proc/self/pagemap hides page frames from this process.",
            remedy="Run the agent with CAP_SYS_ADMIN in the initial user namespace.",
        )
    return frame
