"""The target hypervisor: a real libvirtd, in the bridge's namespace, with its own directories."""

from __future__ import annotations

import sys

import libvirt

from deploy.lab.layout import Layout
from deploy.lab.network import inside
from deploy.lab.programs import Processes, wait_until
from deploy.lab.reaper import REPLACED
from deploy.lab.wheels import REPOSITORY

PROCESS = "libvirtd"
START_DEADLINE_S = 60.0

_QEMU_CONF = """\
# Without systemd, cgroups and a libvirt user of our own.
user = "root"
group = "root"
security_driver = "none"
cgroup_controllers = []
namespaces = []
remember_owner = 0
dynamic_ownership = 0
stdio_handler = "file"
"""


def start(lab: Layout, processes: Processes) -> None:
    """Start libvirtd and wait until it answers."""
    private = lab.libvirt_dir
    for name in (*REPLACED, "sock"):
        (private / name).mkdir(parents=True, exist_ok=True)
    (private / "etc" / "qemu.conf").write_text(_QEMU_CONF)
    (private / "etc" / "libvirtd.conf").write_text(
        f'unix_sock_dir = "{lab.libvirt_socket.parent}"\nauth_unix_rw = "none"\nauth_unix_ro = "none"\n'
        f'log_outputs = "2:file:{lab.logs / "libvirtd-own.log"}"\n'
    )
    lab.standby_dir.mkdir(parents=True, exist_ok=True)
    process = processes.start(
        PROCESS,
        inside(lab.hypervisor_namespace, sys.executable, "-m", "deploy.lab.reaper", str(private)),
        environment={"PYTHONPATH": str(REPOSITORY)},
    )

    def answers() -> bool:
        processes.check(process)
        try:
            libvirt.open(lab.hypervisor_uri).close()
        except libvirt.libvirtError:
            return False
        return True

    libvirt.registerErrorHandler(lambda _context, _error: None, None)
    wait_until(answers, START_DEADLINE_S, "libvirtd's start", remedy=f"See {lab.logs / 'libvirtd.log'}.")
