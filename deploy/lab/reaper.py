"""Runs libvirtd where nothing of the host's own libvirt is seen or touched.

    python -m deploy.lab.reaper PRIVATE_DIR

It is started in a network namespace by ``ip netns exec``, which gives it a mount namespace of its own: there
PRIVATE_DIR's subdirectories take the place of libvirt's directories. It adopts orphans: libvirtd's helpers and
virtual machines are made so, and where PID 1 does not reap them, probing QEMU's capabilities takes 45 s instead of 0.6.
On SIGTERM it ends libvirtd and then everything that it has adopted.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_END_DEADLINE_S = 8.0
_NICE = -10

REPLACED = {
    "etc": "/etc/libvirt",
    "lib": "/var/lib/libvirt",
    "run": "/run/libvirt",
    "log": "/var/log/libvirt",
    "cache": "/var/cache/libvirt",
}
"""Subdirectory of PRIVATE_DIR -> the directory that it hides."""


def main() -> int:
    private = Path(sys.argv[1])
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    for name, hidden in REPLACED.items():
        Path(hidden).mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "--bind", str(private / name), hidden], check=True)
    flags = Path("/proc/cpuinfo").read_text().split()
    if Path("/dev/kvm").exists() and "vmx" not in flags and "svm" not in flags:
        _hide_kvm(private / "dev")
    # The standby stands for a machine of its own, which would not wait for this host's other work.
    os.nice(_NICE)
    daemon = subprocess.Popen(
        ["libvirtd", "--config", str(private / "etc" / "libvirtd.conf"), "--pid-file", str(private / "libvirtd.pid")],
        start_new_session=True,
    )
    signal.signal(signal.SIGTERM, lambda _number, _frame: daemon.terminate())
    status = 0
    while True:
        pid, ended = os.wait()
        if pid == daemon.pid:
            status = os.waitstatus_to_exitcode(ended)
            break
    _end_adopted()
    return status


def _hide_kvm(new: Path) -> None:
    """Give libvirtd a /dev without /dev/kvm. There is no CPU behind the node: opening it may hang, and while it exists
    libvirt distrusts what it found out, and asks QEMU for its capabilities at every definition (8 s instead of 2 ms).
    """
    new.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0755", "tmpfs", str(new)], check=True)
    (new / "net").mkdir()
    for name in ("null", "zero", "full", "random", "urandom", "tty", "net/tun"):
        subprocess.run(["cp", "-a", f"/dev/{name}", str(new / name)], check=True)
    for name in ("pts", "shm"):
        (new / name).mkdir()
        subprocess.run(["mount", "--bind", f"/dev/{name}", str(new / name)], check=True)
    (new / "ptmx").symlink_to("pts/ptmx")
    (new / "fd").symlink_to("/proc/self/fd")
    subprocess.run(["mount", "--rbind", str(new), "/dev"], check=True)


def _end_adopted() -> None:
    """SIGTERM, then SIGKILL, to every remaining child, until there is none."""
    end = time.monotonic() + _END_DEADLINE_S
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in _children():
            os.kill(pid, number)
        while time.monotonic() < end or number == signal.SIGKILL:
            try:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    time.sleep(0.05)
            except ChildProcessError:
                return


def _children() -> list[int]:
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


if __name__ == "__main__":
    sys.exit(main())
