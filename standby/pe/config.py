"""What the hypervisor side tells the PE: one small read-only disk, with the serial ``cdp-config``, that holds JSON.

The disk is the JSON text, padded with zeros to whole sectors: nothing has to be mounted or parsed beside it. The target
disks are told apart by their serials, whatever order the kernel finds them in.
"""

from __future__ import annotations

import ipaddress
import uuid
from pathlib import Path
from typing import Final

import msgspec

from journal.errors import CdpError

CONFIG_SERIAL: Final = "cdp-config"
CONFIG_BYTES_MAX: Final = 1 << 20
_SECTOR_BYTES: Final = 512


class PeMisconfigured(CdpError):
    """The PE was started without a configuration, or with one that makes no sense."""

    code = "pe-misconfigured"
    http_status = 422


class PeNetwork(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """``address`` with its prefix, as in ``10.0.0.20/24``. ``mac`` says on which interface if there are several."""

    address: str
    gateway: str | None = None
    mac: str | None = None

    def __post_init__(self) -> None:
        ipaddress.ip_interface(self.address)
        if self.gateway is not None:
            ipaddress.ip_address(self.gateway)


class PeDisk(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """``index``: the disk's number in extent tables; ``serial``: of the target disk (at most 20 characters)."""

    index: int
    serial: str


class PeConfig(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    server: str
    ca_pem: str
    machine: str
    credential: str
    secret: str
    network: PeNetwork
    disks: tuple[PeDisk, ...]

    def __post_init__(self) -> None:
        uuid.UUID(self.machine)
        if not self.server.startswith("https://"):
            raise ValueError(f"the server's address {self.server!r} does not start with https://")
        if not self.disks or len({disk.index for disk in self.disks}) != len(self.disks):
            raise ValueError("there are no disks, or two with one number")

    def to_disk(self) -> bytes:
        """The content of the configuration disk."""
        text = msgspec.json.encode(self)
        if len(text) > CONFIG_BYTES_MAX:
            raise ValueError(f"a PE's configuration has at most {CONFIG_BYTES_MAX} bytes")
        return text + bytes(-len(text) % _SECTOR_BYTES)


def load(path: Path) -> PeConfig:
    """Read the configuration disk. Raises ``PeMisconfigured``."""
    with path.open("rb") as disk:
        text = disk.read(CONFIG_BYTES_MAX).rstrip(b"\0")
    try:
        return msgspec.json.decode(text, type=PeConfig)
    except (msgspec.DecodeError, ValueError) as error:
        # The text holds a secret: only the position and the sort of the mistake are told.
        raise PeMisconfigured(
            f"The configuration disk {path} cannot be read: {error}.",
            remedy="Define the standby again: 'cdp standby define'.",
        ) from error


def device_by_serial(serial: str, sys_block: Path = Path("/sys/block")) -> Path:
    """The device with that serial. Raises ``PeMisconfigured``."""
    seen = []
    for entry in sorted(sys_block.iterdir()):
        found = entry / "serial"
        if not found.exists():
            found = entry / "device" / "serial"
        if found.exists():
            seen.append(found.read_text().strip())
            # virtio cuts a serial off at 20 characters.
            if seen[-1] == serial[:20]:
                return Path("/dev") / entry.name
    raise PeMisconfigured(
        f"There is no disk with the serial {serial!r}; seen: {', '.join(filter(None, seen)) or 'none'}.",
        remedy="Define the standby again: 'cdp standby define'.",
        serial=serial,
    )
