"""What the hypervisor side tells the PE: one small read-only disk, with the serial ``cdp-config``.

The disk is a tar archive with one member, ``pe.json`` (written by ``standby.target.config_disk``). The target disks are
told apart by their serials, whatever order the kernel finds them in.
"""

from __future__ import annotations

import io
import ipaddress
import tarfile
import uuid
from pathlib import Path
from typing import Final

import msgspec

from journal.errors import CdpError

CONFIG_SERIAL: Final = "cdp-config"
CONFIG_BYTES_MAX: Final = 1 << 20
_MEMBER: Final = "pe.json"


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


def load(path: Path) -> PeConfig:
    """Read the configuration disk. Raises ``PeMisconfigured``."""
    try:
        with path.open("rb") as disk:
            content = io.BytesIO(disk.read(CONFIG_BYTES_MAX))
        with tarfile.open(fileobj=content, mode="r:") as tar:
            member = tar.extractfile(_MEMBER)
            return msgspec.json.decode(b"" if member is None else member.read(), type=PeConfig)
    except (OSError, KeyError, tarfile.TarError, msgspec.DecodeError, ValueError) as error:
        # The text holds a secret: msgspec tells the place and the sort of a mistake, never the value.
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
