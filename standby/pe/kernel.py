"""A Linux kernel as a file: its release, and the quickest form in which it can be started.

A bzImage unpacks itself. Without hardware virtualisation that takes seconds of downtime (xz: 5 s); unpacked before
it takes half a second, but then its addresses are not randomised until the next reboot. So the unpacked form is
used only where unpacking is slow, which is measured on the spot.
"""

from __future__ import annotations

import lzma
import struct
import time
import zlib
from dataclasses import dataclass
from typing import Final

import zstandard

from standby.pe.errors import KexecFailed

UNPACK_S_MAX: Final = 1.5
"""Longer than this, and the downtime is worth more than the randomisation."""
_ELF_BYTES_MAX: Final = 256 << 20
HEAD_BYTES: Final = 128 << 10
"""Enough of a bzImage to find its release."""
_ELF: Final = b"\x7fELF"


@dataclass(frozen=True, slots=True)
class Kernel:
    """``image``: a bzImage, or an ELF file if ``unpacked``. ``release`` as in /lib/modules."""

    release: str
    image: bytes
    unpacked: bool


def release_of(image: bytes) -> str:
    """The release that a bzImage states in its header. Raises ``KexecFailed``."""
    if len(image) < 0x1000 or image[0x202:0x206] != b"HdrS":
        raise _unknown("it is no Linux kernel for x86")
    at = int(struct.unpack_from("<H", image, 0x20E)[0]) + 0x200
    text = image[at : at + 256].split(b"\0", 1)[0].decode(errors="replace")
    if not text:
        raise _unknown("it does not state its release")
    return text.split(" ", 1)[0]


def quickest(image: bytes) -> Kernel:
    """The kernel in the form that starts sooner on this machine."""
    release = release_of(image)
    began_s = time.monotonic()
    unpacked = _unpack(image)
    if unpacked is None or time.monotonic() - began_s < UNPACK_S_MAX:
        return Kernel(release, image, unpacked=False)
    return Kernel(release, unpacked, unpacked=True)


def _unpack(image: bytes) -> bytes | None:
    """The ELF file inside of a bzImage; None if it is packed in a way that unpacks quickly or that we do not know."""
    setup_sectors = image[0x1F1] or 4
    if struct.unpack_from("<H", image, 0x206)[0] < 0x208:
        return None
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    payload = image[start : start + length]
    try:
        if payload.startswith(b"\xfd7zXZ"):
            unpacked = lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(payload, _ELF_BYTES_MAX)
        elif payload.startswith(b"\x1f\x8b"):
            unpacked = zlib.decompressobj(16 + zlib.MAX_WBITS).decompress(payload, _ELF_BYTES_MAX)
        elif payload.startswith(b"\x28\xb5\x2f\xfd"):
            unpacked = zstandard.ZstdDecompressor().decompressobj().decompress(payload)
        else:
            return None
    except (lzma.LZMAError, zlib.error, zstandard.ZstdError):
        return None
    return unpacked if unpacked.startswith(_ELF) else None


def _unknown(why: str) -> KexecFailed:
    return KexecFailed(
        f"The replicated kernel cannot be started: {why}.",
        remedy="Only x86-64 bzImage kernels are supported.",
    )
