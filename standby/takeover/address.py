"""IP drift: who holds a service address, taking it away, taking it over, and telling the neighbours.

Shared by the agent (which gives the address up) and the PE (which takes it over), so it needs pyroute2 and nothing
else. Every function **blocks**: call it in a thread (pyroute2 runs an event loop of its own). Addresses are written
with their prefix, ``10.0.0.5/24`` or ``fd00::5/64``; they are compared without it.

    remove     take addresses off this machine; the evidence is what a fresh look at the kernel shows afterwards
    holds      which of them this machine holds, and where
    add        put them on a device (IPv6 without duplicate address detection: the probe has been made)
    probe      does anybody else on the link answer for them?
    announce   make the neighbours send their traffic here, repeated because any one frame may be lost
    take       probe, add and announce at once: what a standby does
"""

from __future__ import annotations

import errno
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from ipaddress import IPv4Interface, IPv6Interface, ip_interface
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from journal.errors import CdpError
from standby.takeover import frames, routes

ANNOUNCE_AT_S = (0.0, 1.0, 3.0)
"""When announcements are repeated: a switch may drop the first while it learns the new port."""
PROBE_AT_S = (0.0, 0.07, 0.14)
"""RFC 5227 sends three probes over seconds; here they are close together, for downtime is running."""
PROBE_LISTEN_S = 0.3
"""From the first probe to the verdict "nobody answers"."""

_IFA_F_NODAD = 0x02
_ETHERNET_DEVICE = 1  # ARPHRD_ETHER
_ETH_P_ALL = 3
_PACKET_IGNORE_OUTGOING = 23
_SOL_PACKET = 263
_PACKET_ADD_MEMBERSHIP = 1
_PACKET_MR_ALLMULTI = 2

Interface = IPv4Interface | IPv6Interface


class AddressInUse(CdpError):
    """Somebody else on the link answers for a service address."""

    code = "address-in-use"
    http_status = 409


class DeviceUnknown(CdpError):
    """There is no network device on which the address could be put."""

    code = "device-unknown"
    http_status = 422


class AddressFailed(CdpError):
    """The kernel refused to add or remove an address."""

    code = "address-failed"


@dataclass(frozen=True, slots=True)
class Evidence:
    """What ``remove`` did and what it found afterwards.

    ``removed``    taken off by this call, as they were on the device (with their prefix)
    ``absent``     were not here in the first place
    ``remaining``  are still here: the machine is *not* fenced while this is not empty
    ``devices``    address -> the device that it was on, to put it back there
    ``routes``     routes that went with the addresses and could not be kept, for ``add`` to put back
    """

    removed: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    remaining: tuple[str, ...] = ()
    devices: dict[str, str] = field(default_factory=dict)
    routes: tuple[dict[str, Any], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return asdict(self) | {
            "removed": list(self.removed),
            "absent": list(self.absent),
            "remaining": list(self.remaining),
            "routes": list(self.routes),
        }


@dataclass(frozen=True, slots=True)
class Answer:
    """``mac`` answered for ``address``."""

    address: str
    mac: str


def holds(addresses: Sequence[str], dev: str | None = None) -> dict[str, str]:
    """Those of ``addresses`` that this machine holds (on ``dev``, if given) -> the name of their device.

    An IPv6 address that is still tentative counts: the machine defends it already.
    """
    wanted = {_parse(text).ip: text for text in addresses}
    with IPRoute() as ip:
        return {wanted[own.ip]: name for own, name, _ in _own(ip) if own.ip in wanted and dev in (None, name)}


def remove(addresses: Sequence[str], dev: str | None = None) -> Evidence:
    """Take ``addresses`` off this machine (off ``dev`` only, if given), with whatever prefix they have there.

    Nothing else may change: a secondary address of the same subnet is kept (the kernel would drop it with its
    primary), and so are routes that merely preferred the address as their source. Repeatable.
    """
    wanted = {_parse(text).ip: text for text in addresses}
    removed: list[str] = []
    devices: dict[str, str] = {}
    lost: list[dict[str, Any]] = []
    with IPRoute() as ip:
        for own, name, index in _own(ip):
            if own.ip not in wanted or dev not in (None, name):
                continue
            before = routes.of_device(ip, index, own.version)
            with _promoted_secondaries(name):
                _change(ip, "del", own, name, index)
            lost += routes.restore(ip, before, index, own.version, without_source=str(own.ip))
            removed.append(str(own))
            devices[str(own)] = name
    remaining = holds(addresses, dev)
    gone = {_parse(text).ip for text in removed}
    absent = tuple(text for ip_, text in wanted.items() if ip_ not in gone and text not in remaining)
    return Evidence(tuple(removed), absent, tuple(remaining), devices, tuple(lost))


def add(addresses: Sequence[str], dev: str | None = None, lost_routes: Sequence[dict[str, Any]] = ()) -> dict[str, str]:
    """Put ``addresses`` on ``dev`` (default: the device of the default route) and return what ``holds`` then says.

    ``lost_routes`` are ``Evidence.routes`` of the removal that this undoes. Repeatable. Raises ``DeviceUnknown`` and
    ``AddressFailed``.
    """
    held = holds(addresses)
    with IPRoute() as ip:
        for text in addresses:
            if text not in held:
                name, index = _device(ip, dev, ip_interface(text).version)
                _change(ip, "add", _parse(text), name, index)
        routes.put_back(ip, lost_routes)
    held = holds(addresses)
    missing = [text for text in addresses if text not in held]
    if missing:
        raise AddressFailed(
            f"The kernel does not show {', '.join(missing)} after it was added.",
            remedy="Look at 'ip address' and at other network managers on this machine.",
            missing=missing,
        )
    return held


def announce(
    addresses: Sequence[str],
    dev: str | None = None,
    *,
    at_s: Sequence[float] = ANNOUNCE_AT_S,
    mac: str | None = None,
    pause: Callable[[float], object] = time.sleep,
) -> int:
    """Tell the link, ``at_s`` seconds from now, that ``addresses`` are at ``mac`` (default: the device's own).

    Returns the number of frames sent; 0 on a device without link-layer addresses, where nobody needs to be told.
    """
    at = 0.0
    sent = 0
    with IPRoute() as ip:
        links = {text: _link(ip, _device(ip, dev, _parse(text).version)[1]) for text in addresses}
    for moment in at_s:
        if moment > at:
            pause(moment - at)
            at = moment
        for text, link in links.items():
            if link.mac is None:
                continue
            told = link.mac if mac is None else bytes.fromhex(mac.replace(":", ""))
            with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as raw:
                raw.bind((link.name, 0))
                for frame in frames.announcements(_parse(text).ip, told):
                    _send(raw, frame, link)
                    sent += 1
    return sent


def probe(
    addresses: Sequence[str],
    dev: str | None = None,
    *,
    at_s: Sequence[float] = PROBE_AT_S,
    listen_s: float = PROBE_LISTEN_S,
) -> tuple[Answer, ...]:
    """Who else on the link answers for ``addresses``? Empty after ``listen_s`` of silence; sooner if all answered.

    Only neighbours are seen: a machine behind a router has to be asked by other means.
    """
    with IPRoute() as ip:
        links = {_link(ip, _device(ip, dev, _parse(text).version)[1]) for text in addresses}
    answers: dict[str, str] = {}
    for link in links:
        if link.mac is not None:
            answers |= _probe_link(addresses, link, link.mac, at_s, listen_s)
    return tuple(Answer(address, mac) for address, mac in answers.items())


def take(
    addresses: Sequence[str], dev: str | None = None, *, force: bool = False, at_s: Sequence[float] = (0.0,)
) -> dict[str, str]:
    """Take ``addresses`` over: refuse if somebody else answers for one (unless ``force``), add, announce at ``at_s``.

    What this machine holds already is only announced again. Raises ``AddressInUse``.
    """
    held = holds(addresses)
    foreign = [text for text in addresses if text not in held]
    if foreign and not force and (answers := probe(foreign, dev)):
        raise AddressInUse(
            "The service address is still in use: "
            + ", ".join(f"{answer.address} answers from {answer.mac}" for answer in answers)
            + ".",
            remedy="Stop that machine or take it off the network; or force the takeover if you know that it is wrong.",
            answers=[asdict(answer) for answer in answers],
        )
    held = add(addresses, dev)
    announce(addresses, dev, at_s=at_s)
    return held


@dataclass(frozen=True, slots=True)
class _Link:
    name: str
    index: int
    mac: bytes | None
    """None if the device is not an Ethernet one."""


def _parse(text: str) -> Interface:
    return ip_interface(text)


def _own(ip: IPRoute) -> Iterator[tuple[Interface, str, int]]:
    """Every address of this machine: ``(address, device name, device index)``."""
    names = {link["index"]: link.get_attr("IFLA_IFNAME") for link in ip.get_links()}
    for message in list(ip.get_addr()):
        # On a point-to-point device IFA_ADDRESS is the peer; IFA_LOCAL is ours wherever it exists.
        text = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
        if text is not None and message["index"] in names:
            yield _parse(f"{text}/{message['prefixlen']}"), names[message["index"]], message["index"]


def _device(ip: IPRoute, dev: str | None, version: int) -> tuple[str, int]:
    """``(name, index)`` of ``dev``, or of the device with the default route, or of the only one that could serve."""
    links = {link["index"]: link for link in ip.get_links()}
    if dev is not None:
        for index, link in links.items():
            if link.get_attr("IFLA_IFNAME") == dev:
                return dev, index
        raise DeviceUnknown(f"There is no network device {dev}.", remedy="See 'ip link' for the names.", device=dev)
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    for route in ip.get_default_routes(family=family):
        index = route.get_attr("RTA_OIF")
        if index in links:
            return links[index].get_attr("IFLA_IFNAME"), index
    candidates = [index for index, link in links.items() if link["ifi_type"] == _ETHERNET_DEVICE and link["flags"] & 1]
    if len(candidates) == 1:
        return links[candidates[0]].get_attr("IFLA_IFNAME"), candidates[0]
    raise DeviceUnknown(
        f"No default route says which of {len(candidates)} network devices should carry the service address.",
        remedy="Name the device in the machine's configuration.",
        candidates=[links[index].get_attr("IFLA_IFNAME") for index in candidates],
    )


def _link(ip: IPRoute, index: int) -> _Link:
    link = next(iter(ip.get_links(index)))
    mac = link.get_attr("IFLA_ADDRESS") if link["ifi_type"] == _ETHERNET_DEVICE else None
    return _Link(link.get_attr("IFLA_IFNAME"), index, bytes.fromhex(mac.replace(":", "")) if mac else None)


def _change(ip: IPRoute, verb: str, address: Interface, name: str, index: int) -> None:
    """Add or delete, where "is so already" is success."""
    done_already = errno.EEXIST if verb == "add" else errno.EADDRNOTAVAIL
    flags = {"flags": _IFA_F_NODAD} if verb == "add" and address.version == 6 else {}
    try:
        ip.addr(verb, index=index, address=str(address.ip), prefixlen=address.network.prefixlen, **flags)
    except NetlinkError as error:
        if error.code != done_already:
            raise AddressFailed(
                f"The kernel would not {verb} {address} on {name}: {error}.",
                remedy="The caller needs CAP_NET_ADMIN; for IPv6 see net.ipv6.conf.*.disable_ipv6.",
                address=str(address),
                device=name,
                errno=error.code,
            ) from error


@contextmanager
def _promoted_secondaries(name: str) -> Iterator[None]:
    """Without this, deleting a primary IPv4 address deletes the other addresses of its subnet with it."""
    switch = Path("/proc/sys/net/ipv4/conf") / name / "promote_secondaries"
    before = switch.read_text().strip()
    switch.write_text("1\n")
    try:
        yield
    finally:
        switch.write_text(f"{before}\n")


def _probe_link(
    addresses: Sequence[str], link: _Link, mac: bytes, at_s: Sequence[float], listen_s: float
) -> dict[str, str]:
    wanted = {_parse(text).ip: text for text in addresses}
    answers: dict[str, str] = {}
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as raw:
        frames.attach_filter(raw)
        raw.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
        # A device without an IPv6 address of its own does not listen to "all nodes", where the answers go.
        membership = struct.pack("iHH8s", link.index, _PACKET_MR_ALLMULTI, 0, b"")
        raw.setsockopt(_SOL_PACKET, _PACKET_ADD_MEMBERSHIP, membership)
        raw.bind((link.name, _ETH_P_ALL))
        start = time.monotonic()
        due = sorted(at_s)
        while len(answers) < len(wanted):
            passed = time.monotonic() - start
            if passed >= listen_s:
                break
            while due and due[0] <= passed:
                due.pop(0)
                for address in wanted:
                    _send(raw, frames.probe(address, mac), link)
            raw.settimeout(max(0.001, min([*due[:1], listen_s]) - passed))
            try:
                said = frames.claim(raw.recv(frames.FRAME_BYTES_MAX))
            except TimeoutError:
                continue
            if said is not None and said.mac != mac and said.address in wanted:
                answers[wanted[said.address]] = said.mac.hex(":")
    return answers


def _send(raw: socket.socket, frame: bytes, link: _Link) -> None:
    try:
        raw.send(frame)
    except OSError as error:
        raise AddressFailed(
            f"Nothing can be sent on {link.name}: {error.strerror}.",
            remedy="Bring the link up ('ip link').",
            device=link.name,
            errno=error.errno,
        ) from error
