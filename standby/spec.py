"""What the operator asked for: one machine's protection and takeover specification.

The server keeps it (``MachineSpec`` as JSON); the takeover controller, the libvirt side and the standby read it. It
names no command: what quiescing means on the source is the source's own configuration, so that whoever holds the
server cannot make a protected machine run anything.

Addresses carry their prefix (``10.0.0.5/24``, ``fd00::5/64``). Sizes are bytes, times seconds. Every text is checked
when the structure is made, so that a bad specification is refused when it is given, not during a takeover.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
import uuid
from typing import Literal

import msgspec

from journal.wire import DiskInfo

NAME_BYTES_MAX = 63
"""A machine's name becomes part of a libvirt domain name, file names and metric labels."""
_NAME = re.compile(r"^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$")
_PATH = re.compile(r"^/[A-Za-z0-9/_.,~%?&=+-]*$")
_INTERFACE = re.compile(r"^[A-Za-z0-9_.-]{1,15}$")

ADDRESSES_MAX = 32
PROBES_MAX = 16


class _Frozen(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """Values: unknown fields are errors, and nothing changes after the check."""


ProbeKind = Literal["tcp", "http", "https", "postgresql"]
QuiesceMode = Literal["postgresql", "freeze", "hooks", "none"]
"""``postgresql``: checkpoint and stop the service; ``freeze``: fsfreeze; ``hooks``: those of the agent's own
configuration; ``none``: seal only (crash-consistent)."""


class Probe(_Frozen, frozen=True):
    """How the server finds out that a service answers, at every service address.

    ``tcp``: the port accepts; ``postgresql``: the server answers an SSLRequest; ``http``/``https``: any status below
    500 at ``path`` (certificates are not checked: the question is whether it is up).
    """

    kind: ProbeKind
    port: int
    path: str = "/"

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 65535:
            raise ValueError(f"probe port {self.port} is outside 1..65535")
        if not _PATH.match(self.path):
            raise ValueError(f"probe path {self.path!r} is not a URL path")

    @classmethod
    def parse(cls, text: str) -> Probe:
        """``tcp:5432``, ``postgresql:5432``, ``http:80/health``, ``https:443/``; raises ``ValueError``."""
        match = re.fullmatch(r"(tcp|postgresql|https?):([0-9]{1,5})(/.*)?", text)
        if match is None or (match[3] and not match[1].startswith("http")):
            raise ValueError(f"{text!r} is not a probe (tcp:PORT, postgresql:PORT, http:PORT/PATH, https:PORT/PATH)")
        return msgspec.convert({"kind": match[1], "port": int(match[2]), "path": match[3] or "/"}, cls)

    def __str__(self) -> str:
        return f"{self.kind}:{self.port}{self.path if self.kind.startswith('http') else ''}"


class Deadlines(_Frozen, frozen=True):
    """Seconds that each phase of a takeover may take before it counts as failed. The defaults suit a machine without
    hardware virtualisation; they bound a failure, they do not slow a success."""

    check: float = 15.0
    quiesce: float = 60.0
    seal: float = 30.0
    fence: float = 20.0
    drain: float = 60.0
    inject: float = 60.0
    ip_drift: float = 20.0
    finish_boot: float = 30.0
    probe: float = 180.0

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if not 0.1 <= value <= 3600:
                raise ValueError(f"deadline {name} = {value} is outside 0.1..3600 seconds")


class SourceDomain(_Frozen, frozen=True):
    """The source is itself a libvirt domain that an unplanned takeover may destroy: the surest fence there is."""

    hypervisor: str
    domain: str

    def __post_init__(self) -> None:
        if not self.hypervisor or not self.domain:
            raise ValueError("a source domain needs a hypervisor URI and a domain name")


class StandbySpec(_Frozen, frozen=True):
    """The target VM. ``management_address`` is what the PE and later the replicated system answer at, beside the
    service addresses; ``storage_dir`` is a directory on the hypervisor."""

    hypervisor: str
    bridge: str
    management_address: str
    gateway: str | None = None
    memory_bytes: int = 1 << 30
    vcpus: int = 2
    storage_dir: str = "/var/lib/libvirt/images"
    machine_type: str = "q35"

    def __post_init__(self) -> None:
        if not self.hypervisor:
            raise ValueError("the hypervisor URI is empty")
        if not _INTERFACE.match(self.bridge):
            raise ValueError(f"{self.bridge!r} is not the name of a network bridge")
        _interface(self.management_address)
        if self.gateway is not None:
            ipaddress.ip_address(self.gateway)
        if not 256 << 20 <= self.memory_bytes <= 1 << 44:
            raise ValueError(f"memory_bytes {self.memory_bytes} is outside 256 MiB..16 TiB")
        if not 1 <= self.vcpus <= 512:
            raise ValueError(f"vcpus {self.vcpus} is outside 1..512")
        if not self.storage_dir.startswith("/"):
            raise ValueError(f"storage_dir {self.storage_dir!r} is not an absolute path")
        if not re.fullmatch(r"[a-z0-9.-]{1,64}", self.machine_type):
            raise ValueError(f"{self.machine_type!r} is not a machine type")


class MachineSpec(_Frozen, frozen=True):
    """One protected machine. ``machine`` is its UUID; ``standby`` is None while it is only journalled."""

    machine: str
    name: str
    disks: tuple[DiskInfo, ...] = ()
    service_addresses: tuple[str, ...] = ()
    probes: tuple[Probe, ...] = ()
    quiesce: QuiesceMode = "freeze"
    standby: StandbySpec | None = None
    source_domain: SourceDomain | None = None
    deadlines: Deadlines = Deadlines()
    silence_s: float = 10.0
    """An unplanned takeover takes the source for gone when its control channel was silent for this long."""
    rollback_window_s: float = 3600.0
    """After a planned takeover: how long the fenced source is kept ready to take over again."""
    automatic_rollback: bool = True
    """Planned only: go back to the source by itself when the standby does not answer within its deadlines."""

    def __post_init__(self) -> None:
        uuid.UUID(self.machine)
        check_name(self.name)
        if len(self.service_addresses) > ADDRESSES_MAX or len(self.probes) > PROBES_MAX:
            raise ValueError(f"at most {ADDRESSES_MAX} service addresses and {PROBES_MAX} probes")
        hosts = [_interface(address).ip for address in self.service_addresses]
        if self.standby is not None:
            hosts.append(_interface(self.standby.management_address).ip)
        if len(set(hosts)) != len(hosts):
            raise ValueError("an address is named twice among service and management addresses")
        if not 0.1 <= self.silence_s <= 3600 or not 0 <= self.rollback_window_s <= 30 * 86400:
            raise ValueError("silence_s is outside 0.1..3600 or rollback_window_s outside 0..30 days")

    @property
    def machine_id(self) -> uuid.UUID:
        return uuid.UUID(self.machine)

    @property
    def domain_name(self) -> str:
        return f"cdp-{self.name}"

    @property
    def domain_uuid(self) -> uuid.UUID:
        """Fixed, so that a redefinition is the same domain to libvirt."""
        return uuid.uuid5(self.machine_id, "cdp standby domain")

    @property
    def mac(self) -> str:
        """Of the standby's network interface: fixed, in QEMU's prefix."""
        tail = hashlib.sha256(b"cdp standby mac\0" + self.machine_id.bytes).digest()[:3]
        return "52:54:00:" + tail.hex(":")

    @property
    def service_hosts(self) -> list[str]:
        """The service addresses without their prefixes."""
        return [str(_interface(address).ip) for address in self.service_addresses]


def check_name(name: str) -> None:
    """Raise ``ValueError`` unless ``name`` may name a machine."""
    if len(name) > NAME_BYTES_MAX or not _NAME.match(name):
        raise ValueError(
            f"{name!r} is not a machine name (lower case letters, digits, '.', '_' and '-', at most {NAME_BYTES_MAX})"
        )


def _interface(text: str) -> ipaddress.IPv4Interface | ipaddress.IPv6Interface:
    if "/" not in text:
        raise ValueError(f"address {text!r} lacks its prefix length, as in {text}/24")
    return ipaddress.ip_interface(text)
