"""The replicated system's own network configuration: what it calls its card, and its management address.

    ifupdown          /etc/network/interfaces, interfaces.d/*
    systemd-networkd  /etc/systemd/network/*.network
    netplan           /etc/netplan/*.yaml
    NetworkManager    /etc/NetworkManager/system-connections/*
    RHEL scripts      /etc/sysconfig/network-scripts/ifcfg-*

The service addresses stay as they are configured. The source's management address would be in two places, so it is
replaced by the standby's: the address in the same network that is neither a service address nor a gateway.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from standby.pe.system import resolve

_FILES: Final = (
    ("etc/network", "interfaces"),
    ("etc/network/interfaces.d", "*"),
    ("etc/systemd/network", "*.network"),
    ("etc/netplan", "*.yaml"),
    ("etc/netplan", "*.yml"),
    ("etc/NetworkManager/system-connections", "*"),
    ("etc/sysconfig/network-scripts", "ifcfg-*"),
)
_FILE_BYTES_MAX: Final = 1 << 20
_ADDRESS_LINE: Final = re.compile(r"^\s*(?:(?:address\d*|addresses|ipaddr\d*|ipv6addr)[\s=:]|-\s)", re.IGNORECASE)
_BARE_LINE: Final = re.compile(r"^\s*(address\s|ipaddr|ipv6addr)", re.IGNORECASE)
"""Where an address may stand without its prefix length, because a line of its own gives the netmask."""
_MAC_LINE: Final = re.compile(r"^\s*(mac-?address|hwaddr|macaddr|hwaddress|permanentmacaddress)\b", re.IGNORECASE)
_TOKEN: Final = re.compile(r"(?<![0-9A-Fa-f:.])([0-9A-Fa-f]*[:.][0-9A-Fa-f:.]+)(/\d{1,3})?(?![0-9A-Fa-f:.])")
_MAC: Final = re.compile(r"\b[0-9A-Fa-f]{2}(?::[0-9A-Fa-f]{2}){5}\b")
_NAMES: Final = (
    re.compile(r"^\s*iface\s+(\S+)\s+inet", re.MULTILINE),
    re.compile(r"^\s*(?:Name|interface-name|DEVICE)\s*=\s*\"?([^\s\"]+)\"?\s*$", re.MULTILINE),
    re.compile(r"^\s*set-name:\s*(\S+)", re.MULTILINE),
    re.compile(r"^\s{2,8}((?:en|eth|ens|eno|enp)[A-Za-z0-9]+):\s*$", re.MULTILINE),
)
_NAME: Final = re.compile(r"^[A-Za-z0-9_.-]{1,15}$")


def card_name(root: Path, service_hosts: frozenset[str]) -> str | None:
    """What the configuration calls the card with a service address; else the first that it names; None: any name.

    A pattern such as ``en*`` is no name: then the kernel's choice will do.
    """
    first = None
    for path in _files(root):
        text = path.read_text(errors="replace")
        at = {match.start(): match[1] for pattern in _NAMES for match in pattern.finditer(text)}
        names = [(start, name) for start, name in sorted(at.items()) if name != "lo" and _NAME.match(name)]
        # The name that stands nearest above a service address.
        for token in _TOKEN.finditer(text):
            above = [name for start, name in names if start < token.start()]
            if above and _host(token[1]) in service_hosts:
                return above[-1]
        if first is None and names:
            first = names[0][1]
    return first


def adapt(root: Path, service_hosts: frozenset[str], management: str, gateway: str | None, mac: str) -> list[str]:
    """Put the standby's management address (with prefix) and MAC where the source's stand; what was changed."""
    own = ipaddress.ip_interface(management)
    kept = service_hosts | {str(own.ip)} | ({str(ipaddress.ip_address(gateway))} if gateway else frozenset())
    replaced: list[str] = []
    bare_allowed = False

    def swapped(token: re.Match[str]) -> str:
        host = _host(token[1])
        # Without a prefix it may as well be a name server or a gateway.
        if host is None or host in kept or (token[2] is None and not bare_allowed) or replaced not in ([], [host]):
            return token[0]
        if ipaddress.ip_address(host) not in own.network:
            return token[0]
        replaced[:] = [host]
        return f"{own.ip}{token[2] or ''}"

    changed = []
    for path in _files(root):
        lines = path.read_text(errors="surrogateescape").splitlines(keepends=True)
        out = []
        for line in lines:
            new = _MAC.sub(mac, line) if _MAC_LINE.match(line) else line
            if _ADDRESS_LINE.match(line):
                bare_allowed = _BARE_LINE.match(line) is not None
                new = _TOKEN.sub(swapped, new)
            out.append(new)
        if out != lines:
            path.write_text("".join(out), errors="surrogateescape")
            changed.append(f"/{path.relative_to(root)}: this machine's own address and card")
    if replaced:
        changed.append(f"management address {own.ip} instead of {replaced[0]}")
    return changed


def _files(root: Path) -> Iterator[Path]:
    for directory, pattern in _FILES:
        for path in sorted(resolve(root, directory).glob(pattern)):
            if path.is_file() and not path.is_symlink() and path.stat().st_size <= _FILE_BYTES_MAX:
                yield path


def _host(text: str) -> str | None:
    """The address, as ``ipaddress`` writes it; None if it is none."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        return None
