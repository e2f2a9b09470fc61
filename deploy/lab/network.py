"""The lab's network: three namespaces on one bridge, out of reach of the host's own network.

NAME-hv      br-lab 10.77.0.1, the taps of both virtual machines, libvirtd
NAME-server  eth0   10.77.0.2
NAME-client  eth0   10.77.0.50
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

from deploy.lab import layout
from deploy.lab.layout import Layout
from deploy.lab.programs import run, wait_until

SOURCE_TAP = "tap-source"


def inside(namespace: str, *arguments: str) -> list[str]:
    """A command line that runs ``arguments`` in a namespace (and, by the way, in a private mount namespace)."""
    return ["ip", "netns", "exec", namespace, *arguments]


def up(lab: Layout) -> None:
    for namespace in lab.namespaces:
        run(["ip", "netns", "add", namespace])
        # Addresses work at once: nobody else has them, and nothing here waits for the answer.
        run(inside(namespace, "sysctl", "-qw", "net.ipv6.conf.all.accept_dad=0", "net.ipv6.conf.default.accept_dad=0"))
        run(["ip", "-n", namespace, "link", "set", "lo", "up"])
    switch = lab.hypervisor_namespace
    run(
        [
            "ip",
            "-n",
            switch,
            "link",
            "add",
            layout.BRIDGE,
            "type",
            "bridge",
            "forward_delay",
            "0",
            "mcast_snooping",
            "0",
        ]
    )
    _configure(switch, layout.BRIDGE, layout.BRIDGE_ADDRESSES)
    for namespace, port, addresses in (
        (lab.server_namespace, "veth-server", layout.SERVER_ADDRESSES),
        (lab.client_namespace, "veth-client", layout.CLIENT_ADDRESSES),
    ):
        run(["ip", "-n", switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", namespace])
        run(["ip", "-n", switch, "link", "set", port, "master", layout.BRIDGE, "up"])
        _configure(namespace, "eth0", addresses)
    run(["ip", "-n", switch, "tuntap", "add", SOURCE_TAP, "mode", "tap"])
    run(["ip", "-n", switch, "link", "set", SOURCE_TAP, "master", layout.BRIDGE, "up"])


def down(lab: Layout) -> None:
    """End whatever still runs in the namespaces, then delete them, and every interface with them."""
    for namespace in lab.namespaces:
        if (Path("/run/netns") / namespace).exists():
            pids = [int(pid) for pid in run(["ip", "netns", "pids", namespace]).split()]
            for pid in pids:
                _kill(pid)
            wait_until(lambda: not any(_runs(pid) for pid in pids), 10, f"the end of everything in {namespace}")  # noqa: B023
            run(["ip", "netns", "delete", namespace])


def _configure(namespace: str, interface: str, addresses: tuple[str, ...]) -> None:
    for address in addresses:
        run(
            ["ip", "-n", namespace, "address", "add", address, "dev", interface, *(["nodad"] if ":" in address else [])]
        )
    run(["ip", "-n", namespace, "link", "set", interface, "up"])


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
