"""Where everything in the lab is: addresses, namespaces, files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

BRIDGE = "br-lab"
BRIDGE_ADDRESSES = ("10.77.0.1/24", "fd77::1/64")
SERVER_ADDRESSES = ("10.77.0.2/24", "fd77::2/64")
SOURCE_ADDRESS = "10.77.0.10/24"
STANDBY_ADDRESS = "10.77.0.20/24"
CLIENT_ADDRESSES = ("10.77.0.50/24", "fd77::50/64")
SERVICE_ADDRESSES = ("10.77.0.100/24", "fd77::100/64")

SERVER_URL = "https://10.77.0.2:7443"
SOURCE_MAC = "52:54:00:77:00:10"
SOURCE_INTERFACE = "enp0s3"
"""The name that udev gives the NIC in PCI slot 3. On the standby it would have another one."""
SOURCE_DISK_SERIAL = "lab-root"
MACHINE = "source"
"""The protected machine's name at the server."""

DATABASE_PORT = 5432


def host(address: str) -> str:
    """An address without its prefix."""
    return address.partition("/")[0]


@dataclass(frozen=True)
class Layout:
    """One lab. Two labs of different names do not touch each other: same addresses, other namespaces."""

    name: str
    root: Path

    @property
    def hypervisor_namespace(self) -> str:
        """Holds the bridge, libvirtd and both virtual machines' taps."""
        return f"{self.name}-hv"

    @property
    def server_namespace(self) -> str:
        return f"{self.name}-server"

    @property
    def client_namespace(self) -> str:
        return f"{self.name}-client"

    @property
    def namespaces(self) -> tuple[str, ...]:
        return self.hypervisor_namespace, self.server_namespace, self.client_namespace

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def source_disk(self) -> Path:
        return self.root / "source.raw"

    @property
    def source_console(self) -> Path:
        return self.logs / "source-console.log"

    @property
    def standby_dir(self) -> Path:
        return self.root / "standby"

    @property
    def standby_console(self) -> Path:
        return self.standby_dir / f"{MACHINE}-console.log"

    @property
    def server_dir(self) -> Path:
        return self.root / "server"

    @property
    def server_config(self) -> Path:
        return self.root / "server.toml"

    @property
    def code(self) -> Path:
        """Our wheel, unpacked."""
        return self.root / "code"

    @property
    def libvirt_dir(self) -> Path:
        return self.root / "libvirt"

    @property
    def libvirt_socket(self) -> Path:
        return self.libvirt_dir / "sock" / "libvirt-sock"

    @property
    def hypervisor_uri(self) -> str:
        return f"qemu+unix:///system?socket={self.libvirt_socket}"

    @property
    def ssh_key(self) -> Path:
        return self.root / "ssh-key"

    @property
    def operator_home(self) -> Path:
        """Where the operator's ``cdp`` keeps its credential."""
        return self.root / "operator"


def default_layout(name: str = "cdp-lab") -> Layout:
    """$CDP_LAB_NAME or ``name``, under $CDP_LAB_DIR (/var/lib/cdp-lab). Both short: sockets' paths end at 108 bytes."""
    name = os.environ.get("CDP_LAB_NAME") or name
    return Layout(name, Path(os.environ.get("CDP_LAB_DIR") or "/var/lib/cdp-lab") / name)
