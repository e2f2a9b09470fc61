"""Routes that the kernel drops together with an address, and that must survive it.

Deleting an address deletes every route that preferred it as its source, and those through gateways of its subnet if
no other address of that subnet is left. The first kind is put back at once without the preference; what cannot be put
back is handed to the caller, who gives it back with the address.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

_TABLE_LOCAL = 255
_PROTO_KERNEL = 2
_TYPE_UNICAST = 1
_FAMILIES = {4: 2, 6: 10}
_ROUTES_MAX = 1000
"""A machine with more routes on the service device runs a routing daemon, which looks after them itself."""


def of_device(ip: IPRoute, index: int, version: int) -> list[dict[str, Any]]:
    """The unicast routes of a device that somebody configured; neither the kernel's own nor multipath ones."""
    found: list[dict[str, Any]] = []
    for message in ip.get_routes(family=_FAMILIES[version], oif=index):
        table = message.get_attr("RTA_TABLE") or message["table"]
        if message["proto"] == _PROTO_KERNEL or message["type"] != _TYPE_UNICAST or table == _TABLE_LOCAL:
            continue
        route = {
            "family": _FAMILIES[version],
            "dst": f"{message.get_attr('RTA_DST')}/{message['dst_len']}" if message["dst_len"] else "default",
            "gateway": message.get_attr("RTA_GATEWAY"),
            "oif": index,
            "table": table,
            "proto": message["proto"],
            "scope": message["scope"],
            "priority": message.get_attr("RTA_PRIORITY"),
            "prefsrc": message.get_attr("RTA_PREFSRC"),
        }
        found.append({key: value for key, value in route.items() if value is not None})
    return found[:_ROUTES_MAX]


def restore(
    ip: IPRoute, before: Sequence[dict[str, Any]], index: int, version: int, without_source: str
) -> list[dict[str, Any]]:
    """Put back those of ``before`` that are gone, not preferring ``without_source``; returns what was impossible."""
    now = [_without_source(route) for route in of_device(ip, index, version)]
    lost: list[dict[str, Any]] = []
    for route in sorted(before, key=lambda route: "gateway" in route):  # a gateway may be reached by another of them
        if _without_source(route) in now:
            continue
        kept = _without_source(route) if route.get("prefsrc") == without_source else route
        if not _add(ip, kept) or kept is not route:
            lost.append(route)
    return lost


def put_back(ip: IPRoute, lost: Sequence[dict[str, Any]]) -> None:
    """Undo what ``remove`` did to routes; those that exist by now are replaced, impossible ones left out."""
    for route in lost:
        _add(ip, route)


def _add(ip: IPRoute, route: dict[str, Any]) -> bool:
    try:
        ip.route("replace", **route)
    except NetlinkError:
        return False
    return True


def _without_source(route: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in route.items() if key != "prefsrc"}
