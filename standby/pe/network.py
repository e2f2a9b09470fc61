"""The PE's own address: link up, management address, default route. Blocking; repeatable."""

from __future__ import annotations

import errno
import ipaddress
from collections.abc import Callable
from dataclasses import dataclass

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from standby.pe.config import PeMisconfigured, PeNetwork

_ETHERNET = 1  # ARPHRD_ETHER
_IFA_F_NODAD = 0x02


@dataclass(frozen=True, slots=True)
class Card:
    name: str
    mac: str


def bring_up(network: PeNetwork) -> Card:
    """The interface that now has the address. Raises ``PeMisconfigured`` if there is none."""
    address = ipaddress.ip_interface(network.address)
    with IPRoute() as ip:
        links = [link for link in ip.get_links() if link["ifi_type"] == _ETHERNET]
        if network.mac is not None:
            links = [link for link in links if link.get_attr("IFLA_ADDRESS") == network.mac.lower()]
        if not links:
            raise PeMisconfigured(
                "There is no network interface" + (f" with the address {network.mac}." if network.mac else "."),
                remedy="Define the standby again: 'cdp standby define'.",
            )
        index = links[0]["index"]
        ip.link("set", index=index, state="up")
        flags = {"flags": _IFA_F_NODAD} if address.version == 6 else {}
        _repeatable(
            lambda: ip.addr("add", index=index, address=str(address.ip), prefixlen=address.network.prefixlen, **flags)
        )
        if network.gateway is not None:
            gateway = network.gateway
            everywhere = "default" if address.version == 4 else "::/0"
            _repeatable(lambda: ip.route("add", dst=everywhere, gateway=gateway, oif=index))
        return Card(links[0].get_attr("IFLA_IFNAME"), links[0].get_attr("IFLA_ADDRESS"))


def _repeatable(act: Callable[[], object]) -> None:
    try:
        act()
    except NetlinkError as error:
        if error.code != errno.EEXIST:
            raise PeMisconfigured(
                f"The network cannot be set up: {error}.",
                remedy="Check the standby's management address and gateway in the machine's specification.",
            ) from error
