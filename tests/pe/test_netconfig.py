"""Network configurations as distributions write them: the card's name, and the management address of the standby."""

from __future__ import annotations

from pathlib import Path

import pytest

from standby.pe.netconfig import adapt, card_name

SERVICE = frozenset({"10.77.0.100", "fd77::100"})
MAC = "52:54:00:aa:bb:cc"
CASES = {
    "etc/network/interfaces": (
        "auto lo\niface lo inet loopback\nauto ens3\niface ens3 inet static\n    address 10.77.0.10/24\n"
        "    gateway 10.77.0.1\n    dns-nameservers 10.77.0.53\niface ens3 inet static\n    address 10.77.0.100/24\n"
        "iface ens3 inet6 static\n    address fd77::100/64\n",
        {"address 10.77.0.10/24": "address 10.77.0.20/24"},
    ),
    "etc/network/interfaces.d/old": (
        "iface ens3 inet static\n    address 10.77.0.10\n    netmask 255.255.255.0\n    network 10.77.0.0\n"
        "    hwaddress 00:50:56:01:02:03\n",
        {"address 10.77.0.10": "address 10.77.0.20", "00:50:56:01:02:03": MAC},
    ),
    "etc/systemd/network/10-lan.network": (
        "[Match]\nName=ens3\n\n[Network]\nAddress=10.77.0.10/24\nAddress=10.77.0.100/24\nGateway=10.77.0.1\n"
        "DNS=10.77.0.53\n",
        {"Address=10.77.0.10/24": "Address=10.77.0.20/24"},
    ),
    "etc/netplan/50-cloud-init.yaml": (
        "network:\n  version: 2\n  ethernets:\n    ens3:\n      match:\n        macaddress: 00:50:56:01:02:03\n"
        "      set-name: ens3\n      addresses:\n        - 10.77.0.10/24\n        - 10.77.0.100/24\n"
        "      nameservers:\n        addresses: [10.77.0.53]\n      routes:\n        - to: default\n"
        "          via: 10.77.0.1\n",
        {"- 10.77.0.10/24": "- 10.77.0.20/24", "00:50:56:01:02:03": MAC},
    ),
    "etc/NetworkManager/system-connections/lan.nmconnection": (
        "[connection]\nid=lan\ninterface-name=ens3\n[ethernet]\nmac-address=00:50:56:01:02:03\n[ipv4]\n"
        "address1=10.77.0.10/24,10.77.0.1\naddress2=10.77.0.100/24\ndns=10.77.0.53;\n",
        {"address1=10.77.0.10/24": "address1=10.77.0.20/24", "00:50:56:01:02:03": MAC},
    ),
    "etc/sysconfig/network-scripts/ifcfg-ens3": (
        'DEVICE="ens3"\nHWADDR=00:50:56:01:02:03\nIPADDR=10.77.0.10\nPREFIX=24\nGATEWAY=10.77.0.1\nDNS1=10.77.0.53\n',
        {"IPADDR=10.77.0.10": "IPADDR=10.77.0.20", "00:50:56:01:02:03": MAC},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_only_the_machines_own_address_and_card_change(tmp_path: Path, name: str) -> None:
    text, changes = CASES[name]
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert card_name(tmp_path, SERVICE) == "ens3"
    done = adapt(tmp_path, SERVICE, "10.77.0.20/24", "10.77.0.1", MAC)
    expected = text
    for before, after in changes.items():
        expected = expected.replace(before, after, 1)
    assert path.read_text() == expected
    assert any(name in line for line in done)
    assert adapt(tmp_path, SERVICE, "10.77.0.20/24", "10.77.0.1", MAC) == []


def test_dhcp_and_patterns_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "etc/systemd/network/dhcp.network"
    path.parent.mkdir(parents=True)
    path.write_text("[Match]\nName=en*\n\n[Network]\nDHCP=yes\n")
    assert card_name(tmp_path, SERVICE) is None
    assert adapt(tmp_path, SERVICE, "10.77.0.20/24", None, MAC) == []


def test_the_card_with_the_service_address_is_the_one(tmp_path: Path) -> None:
    path = tmp_path / "etc/network/interfaces"
    path.parent.mkdir(parents=True)
    path.write_text(
        "iface backup0 inet static\n  address 192.168.9.2/24\niface front0 inet static\n  address 10.77.0.100/24\n"
    )
    assert card_name(tmp_path, SERVICE) == "front0"
