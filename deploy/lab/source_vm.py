"""The source machine: a virtual machine that knows nothing of the lab beside its network, and is reached by ssh."""

from __future__ import annotations

import shutil
from pathlib import Path

from deploy.lab import layout, source_image
from deploy.lab.errors import LabFailed
from deploy.lab.layout import Layout, host
from deploy.lab.network import SOURCE_TAP, inside
from deploy.lab.programs import Process, Processes, run, wait_until
from deploy.lab.wheels import REPOSITORY

PROCESS = "source-vm"
MEMORY_MB = 1024
BOOT_DEADLINE_S = 180.0
_TCG_CPU = "qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt,+rdrand"
_SSH_DEADLINE_S = 120.0
_UNITS = REPOSITORY / "deploy" / "systemd"


def has_hardware_virtualisation() -> bool:
    """Asked of the CPU's flags, not of /dev/kvm, whose presence promises nothing."""
    flags = Path("/proc/cpuinfo").read_text().split()
    return "vmx" in flags or "svm" in flags


def prepare(lab: Layout, base_disk: Path, wheel: Path) -> None:
    """Make this lab's disk from the base image."""
    run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "cdp-lab", "-f", str(lab.ssh_key)])
    run(["cp", "--sparse=always", "--reflink=auto", str(base_disk), str(lab.source_disk)])
    overlay = lab.root / "overlay"
    for path, text in _overlay(lab.ssh_key.with_suffix(".pub").read_text()).items():
        target = overlay / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    source_image.customize(lab.source_disk, overlay, wheel, lab.logs / "customize.log")
    shutil.rmtree(overlay)


def start(lab: Layout, processes: Processes) -> Process:
    """Power it on."""
    accelerator = ["-accel", "kvm", "-cpu", "host"]
    if not has_hardware_virtualisation():
        accelerator = ["-accel", "tcg,thread=multi", "-cpu", _TCG_CPU]
    return processes.start(
        PROCESS,
        inside(
            lab.hypervisor_namespace,
            "qemu-system-x86_64",
            *("-name", "source", "-machine", "q35", *accelerator, "-smp", "2", "-m", str(MEMORY_MB)),
            *("-nodefaults", "-display", "none", "-no-user-config"),
            *("-drive", f"file={lab.source_disk},format=raw,if=none,id=root,cache=writeback,discard=unmap"),
            *("-device", f"virtio-blk-pci,drive=root,serial={layout.SOURCE_DISK_SERIAL},bootindex=1"),
            *("-netdev", f"tap,id=net,ifname={SOURCE_TAP},script=no,downscript=no"),
            *("-device", f"virtio-net-pci,netdev=net,mac={layout.SOURCE_MAC},addr=0x3,romfile="),
            *("-device", "virtio-rng-pci"),
            *("-chardev", f"file,id=console,path={lab.source_console},append=on"),
            *("-serial", "chardev:console"),
        ),
    )


def ssh(lab: Layout, *command: str, deadline_s: float = _SSH_DEADLINE_S, address: str = layout.SOURCE_ADDRESS) -> str:
    """Run a command on the machine (as root, through its shell) and return its output."""
    return run([*ssh_command(lab, address), *command], deadline_s=deadline_s)


def ssh_command(lab: Layout, address: str = layout.SOURCE_ADDRESS) -> list[str]:
    return inside(
        lab.hypervisor_namespace,
        "ssh",
        *("-i", str(lab.ssh_key), "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes", "-o", "LogLevel=ERROR"),
        # The host key is new in every lab, and there is nobody between.
        *("-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "ConnectTimeout=5"),
        f"root@{host(address)}",
    )


def wait_booted(lab: Layout, processes: Processes) -> None:
    """Return once ssh answers and PostgreSQL accepts connections."""
    vm = processes.find(PROCESS)
    if vm is None:
        raise LabFailed("The source machine was not started.")

    def answers() -> bool:
        processes.check(vm)
        try:
            ssh(lab, "pg_isready -q -h /var/run/postgresql", deadline_s=30)
        except LabFailed:
            return False
        return True

    wait_until(answers, BOOT_DEADLINE_S, "the source machine's boot", remedy=f"See {lab.source_console}.")


def _overlay(public_key: str) -> dict[str, str]:
    """Path -> content of what makes the image this machine."""
    interface = layout.SOURCE_INTERFACE
    service4, service6 = layout.SERVICE_ADDRESSES
    return {
        "root/.ssh/authorized_keys": public_key,
        "etc/hostname": "source\n",
        "etc/hosts": "127.0.0.1 localhost\n127.0.1.1 source\n::1 localhost ip6-localhost\n",
        "etc/resolv.conf": "",
        "etc/network/interfaces": "source /etc/network/interfaces.d/*\n\nauto lo\niface lo inet loopback\n",
        "etc/network/interfaces.d/10-management": (
            f"auto {interface}\niface {interface} inet static\n    address {layout.SOURCE_ADDRESS}\n"
        ),
        "etc/network/interfaces.d/20-service": (
            f"iface {interface} inet static\n    address {service4}\n\n"
            f"iface {interface} inet6 static\n    address {service6}\n    dad-attempts 0\n    accept_ra 0\n"
        ),
        "etc/postgresql/15/main/conf.d/lab.conf": (
            "listen_addresses = '*'\njit = off\nshared_buffers = 64MB\nmax_wal_size = 128MB\n"
        ),
        "etc/postgresql/15/main/pg_hba.lab": ("host all lab 10.77.0.0/24 trust\nhost all lab fd77::/64 trust\n"),
        "etc/ssh/sshd_config.d/lab.conf": "UseDNS no\n",
        **{f"etc/systemd/system/{unit.name}": unit.read_text() for unit in sorted(_UNITS.glob("cdp-agent*.service"))},
    }
