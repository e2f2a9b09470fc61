"""The configuration disk, from the hypervisor's side: what ``standby.pe.config`` reads inside the PE.

It holds the PE's secret: the volume is readable by the hypervisor's administrator only, and the definition that boots
from the disk does not have it.
"""

from __future__ import annotations

import io
import re
import tarfile

import msgspec

from journal.wire import DiskInfo
from standby.pe.config import CONFIG_BYTES_MAX, CONFIG_SERIAL, PeConfig, PeDisk, PeNetwork
from standby.spec import MachineSpec, StandbySpec

SERIAL = CONFIG_SERIAL
DISK_BYTES = CONFIG_BYTES_MAX
"""One size for all, so that the volume can be used again when the configuration changes."""

_SERIAL_TEXT = re.compile(r"^[A-Za-z0-9_.-]{1,20}$")
"""virtio-blk serials have at most 20 bytes."""

__all__ = ["DISK_BYTES", "SERIAL", "PeConfig", "PeDisk", "PeNetwork", "config_of", "encode", "target_serial"]


def target_serial(disk: DiskInfo) -> str:
    """The serial of the standby's disk: the source's own, so that links by id stay right, where virtio can carry it."""
    return disk.serial if _SERIAL_TEXT.match(disk.serial) and disk.serial != SERIAL else f"cdp-disk-{disk.index}"


def config_of(
    spec: MachineSpec, standby: StandbySpec, *, server: str, ca_pem: str, credential: str, secret: str
) -> PeConfig:
    """Everything that the PE of ``spec`` has to know."""
    return PeConfig(
        server=server,
        ca_pem=ca_pem,
        machine=spec.machine,
        credential=credential,
        secret=secret,
        network=PeNetwork(mac=spec.mac, address=standby.management_address, gateway=standby.gateway),
        disks=tuple(PeDisk(index=disk.index, serial=target_serial(disk)) for disk in spec.disks),
    )


def encode(config: PeConfig) -> bytes:
    """The bytes of the whole disk: a tar archive, so that nothing has to be mounted, with one member."""
    data = msgspec.json.encode(config)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        member = tarfile.TarInfo("pe.json")
        member.size = len(data)
        member.mode = 0o600
        tar.addfile(member, io.BytesIO(data))
    content = out.getvalue()
    if len(content) > DISK_BYTES:
        raise ValueError(f"the PE's configuration has {len(content)} bytes, more than its disk of {DISK_BYTES}")
    return content.ljust(DISK_BYTES, b"\0")
