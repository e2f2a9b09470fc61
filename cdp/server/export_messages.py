"""Paths and bodies of exports: an image held at one recovery point while somebody reads it.

``cdp``, the plugin for nbdkit and the server speak this; the module imports nothing that only the server has. {name} is
a machine's name or UUID, {id} a name that the reader draws for its export.
"""

from __future__ import annotations

from typing import Final

from cdp.server.messages import PREFIX
from journal.wire import DiskInfo, Struct

EXPORT: Final = PREFIX + "/machines/{name}/exports/{id}"
"""PUT ExportRequest -> Export: begin, or go on for another lease; DELETE -> {}: end."""
EXPORT_DATA: Final = EXPORT + "/data"
"""GET ?disk=&offset=&length= -> the bytes themselves, any alignment, at most DATA_BYTES_MAX."""
EXPORT_EXTENTS: Final = EXPORT + "/extents"
"""GET ?disk=&offset=&length= (multiples of 512) -> consecutive extents from ``offset`` on, each a little-endian u64:
its length, plus HOLE if it reads as zeros. At most EXTENTS_MAX: ask for the rest where they end."""

DATA_BYTES_MAX: Final = 32 << 20
EXTENTS_MAX: Final = 1 << 14
HOLE: Final = 1 << 63
LEASE_S: Final = 120.0
"""An export that nobody reads or renews for so long has ended: retention no longer waits for it."""


class ExportRequest(Struct):
    position: str


class Export(Struct):
    machine: str
    name: str
    id: str
    position: str
    disks: list[DiskInfo]
    lease_s: float
