"""The few link-layer frames of an IP drift, as bytes: ARP (RFC 826, 5227) and IPv6 neighbour discovery (RFC 4861).

They are built whole, Ethernet header and checksum included, and sent through packet sockets, so that an address can
be announced or probed that the kernel does not hold (yet), and on behalf of another machine's MAC address.

    frame                     to                      says
    ARP request, spa = tpa    broadcast               "tpa is at my MAC": most stacks update an existing entry
    ARP reply, spa = tpa      broadcast               the same for the stacks that listen to replies only
    ARP request, spa = 0      broadcast               a probe: whoever holds tpa answers, nobody learns anything
    unsolicited NA, override  all nodes               the IPv6 announcement
    NS from ::                solicited-node group    the IPv6 probe (duplicate address detection)
"""

from __future__ import annotations

import ctypes
import socket
import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

ETH_ARP = 0x0806
ETH_IPV6 = 0x86DD
BROADCAST = b"\xff" * 6
ALL_NODES = IPv6Address("ff02::1")
FRAME_BYTES_MAX = 2048
"""More than any of the frames here; a longer one is none of ours."""

_ETHERNET = struct.Struct("!6s6sH")
_ARP = struct.Struct("!HHBBH6s4s6s4s")
_IPV6 = struct.Struct("!IHBB16s16s")
_ND = struct.Struct("!BBHI16s")

_SO_ATTACH_FILTER = 26
_ARP_ETHERNET = (1, 0x0800, 6, 4)
_ARP_REQUEST, _ARP_REPLY = 1, 2
_ICMPV6 = 58
_ND_SOLICITATION, _ND_ADVERTISEMENT = 135, 136
_ND_HOP_LIMIT = 255  # receivers drop neighbour discovery with any other
_NA_OVERRIDE = 0x2000_0000
_OPTION_TARGET_MAC = b"\x02\x01"

IPAddress = IPv4Address | IPv6Address


@dataclass(frozen=True, slots=True)
class Claim:
    """A frame that says "``address`` is at ``mac``"."""

    address: IPAddress
    mac: bytes


def announcements(address: IPAddress, mac: bytes) -> list[bytes]:
    """The frames that make every neighbour send traffic for ``address`` to ``mac``."""
    if isinstance(address, IPv4Address):
        ip = address.packed
        return [
            _arp(_ARP_REQUEST, mac, ip, bytes(6), ip),
            _arp(_ARP_REPLY, mac, ip, BROADCAST, ip),
        ]
    body = address.packed + _OPTION_TARGET_MAC + mac
    return [_nd(_ND_ADVERTISEMENT, _NA_OVERRIDE, body, mac=mac, source=address, group=ALL_NODES)]


def probe(address: IPAddress, mac: bytes) -> bytes:
    """The frame that a holder of ``address`` answers and that changes nobody's neighbour table."""
    if isinstance(address, IPv4Address):
        return _arp(_ARP_REQUEST, mac, bytes(4), bytes(6), address.packed)
    group = IPv6Address(IPv6Address("ff02::1:ff00:0").packed[:13] + address.packed[13:])
    return _nd(_ND_SOLICITATION, 0, address.packed, mac=mac, source=IPv6Address("::"), group=group)


def claim(frame: bytes) -> Claim | None:
    """Who claims which address in this frame, if anybody does. Any bytes are accepted."""
    if len(frame) < _ETHERNET.size:
        return None
    _, source, kind = _ETHERNET.unpack_from(frame)
    if kind == ETH_ARP and len(frame) >= _ETHERNET.size + _ARP.size:
        *shape, _, sender, sender_ip, _, _ = _ARP.unpack_from(frame, _ETHERNET.size)
        if tuple(shape) == _ARP_ETHERNET and sender_ip != bytes(4):
            return Claim(IPv4Address(sender_ip), sender)
    elif kind == ETH_IPV6 and len(frame) >= _ETHERNET.size + _IPV6.size + _ND.size:
        _, _, following, hops, _, _ = _IPV6.unpack_from(frame, _ETHERNET.size)
        icmp_type, code, _, _, target = _ND.unpack_from(frame, _ETHERNET.size + _IPV6.size)
        if (following, hops, icmp_type, code) == (_ICMPV6, _ND_HOP_LIMIT, _ND_ADVERTISEMENT, 0):
            return Claim(IPv6Address(target), source)
    return None


def attach_filter(raw: socket.socket) -> None:
    """Let only frames that ``claim`` understands reach a packet socket: a busy link must not crowd out the answer."""
    load_half, load_byte, equal, verdict = 0x28, 0x30, 0x15, 0x06
    program = [
        (load_half, 0, 0, 12),  # ethertype
        (equal, 5, 0, ETH_ARP),
        (equal, 0, 5, ETH_IPV6),
        (load_byte, 0, 0, 20),  # next header
        (equal, 0, 3, _ICMPV6),
        (load_byte, 0, 0, 54),  # ICMPv6 type
        (equal, 0, 1, _ND_ADVERTISEMENT),
        (verdict, 0, 0, FRAME_BYTES_MAX),
        (verdict, 0, 0, 0),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    raw.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", len(program), ctypes.addressof(code)))


def _arp(operation: int, sender: bytes, sender_ip: bytes, target: bytes, target_ip: bytes) -> bytes:
    header = _ETHERNET.pack(BROADCAST, sender, ETH_ARP)
    return header + _ARP.pack(*_ARP_ETHERNET, operation, sender, sender_ip, target, target_ip)


def _nd(kind: int, flags: int, body: bytes, *, mac: bytes, source: IPv6Address, group: IPv6Address) -> bytes:
    """``body`` is the target address and any options; ``group`` is a multicast address."""
    unsummed = struct.pack("!BBHI", kind, 0, 0, flags) + body
    pseudo = source.packed + group.packed + struct.pack("!II", len(unsummed), _ICMPV6)
    message = unsummed[:2] + struct.pack("!H", _checksum(pseudo + unsummed)) + unsummed[4:]
    ethernet = _ETHERNET.pack(b"\x33\x33" + group.packed[12:], mac, ETH_IPV6)
    ip = _IPV6.pack(6 << 28, len(message), _ICMPV6, _ND_HOP_LIMIT, source.packed, group.packed)
    return ethernet + ip + message


def _checksum(data: bytes) -> int:
    """The internet checksum of an even number of bytes."""
    words: tuple[int, ...] = struct.unpack(f"!{len(data) // 2}H", data)
    total = sum(words)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
