"""Can this kernel capture? Each missing thing is a typed error with its remedy. The file system's root is passed in."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from cdp.agent.capture import errors, libbpf

BPFFS = Path("/sys/fs/bpf")
OBJECT = Path(__file__).parent / "bpf" / "capture.bpf.o"
_CAP_SYS_ADMIN = 21
_libc = ctypes.CDLL(None, use_errno=True)


def check_environment(root: Path = Path("/")) -> None:
    """What files tell: privilege, lockdown, BTF. Raises the first thing that is missing."""
    capabilities = 0
    for line in (root / "proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            capabilities = int(line.split()[1], 16)
    if not capabilities >> _CAP_SYS_ADMIN & 1:
        raise errors.PrivilegeMissing(
            "Capture needs CAP_SYS_ADMIN.", remedy="Run the agent as root, outside of unprivileged containers."
        )
    lockdown = root / "sys/kernel/security/lockdown"
    if lockdown.exists() and "[confidentiality]" in lockdown.read_text():
        raise errors.KernelLockedDown(
            "The kernel is locked down (confidentiality): BPF may not read the payload of writes.",
            remedy="Boot with lockdown=integrity, which Secure Boot needs, or without lockdown.",
        )
    if not (root / "sys/kernel/btf/vmlinux").exists():
        raise errors.KernelUnsupported(
            "The kernel does not describe its types (no /sys/kernel/btf/vmlinux).",
            remedy="Use a kernel built with CONFIG_DEBUG_INFO_BTF, as those of all current distributions are.",
        )


def check_features() -> int:
    """What only the kernel itself can tell. Returns the index of the bio among block_bio_queue's arguments."""
    for what, there in (
        ("BPF ring buffers (5.8)", libbpf.has_map_type(libbpf.MAP_RINGBUF)),
        ("bpf_loop (5.17)", libbpf.has_helper(libbpf.HELPER_LOOP)),
    ):
        if not there:
            raise errors.KernelUnsupported(
                f"The kernel {os.uname().release} lacks {what}.", remedy="Use Linux 5.17 or newer (Debian 12: 6.1)."
            )
    for tracepoint in ("block_bio_queue", "block_rq_complete", "block_bio_complete"):
        arguments = libbpf.tracepoint_arguments(tracepoint)
        if arguments is None:
            raise errors.KernelUnsupported(
                f"The kernel has no tracepoint {tracepoint}.",
                remedy="Use a kernel built with CONFIG_BLOCK tracepoints.",
            )
        if tracepoint == "block_bio_queue":
            queue_arguments = arguments
    return queue_arguments - 1  # (bio), before 5.11 (queue, bio)


def check_object() -> Path:
    """The compiled program's path."""
    if not OBJECT.exists():
        raise errors.BpfObjectMissing(
            f"{OBJECT} is missing: the package was built without the capture program.",
            remedy="Run 'make bpf' before building or installing.",
        )
    return OBJECT


def ensure_bpffs(pin_dir: Path) -> None:
    """Mount the BPF file system at its usual place if ``pin_dir`` needs it. Raises ``BpffsMissing``."""
    if _is_on_bpffs(pin_dir):
        return
    if pin_dir.is_relative_to(BPFFS):
        BPFFS.mkdir(exist_ok=True)
        failed = _libc.mount(b"bpf", os.fsencode(BPFFS), b"bpf", ctypes.c_ulong(0), b"mode=0700")
        if not failed and _is_on_bpffs(pin_dir):
            return
    raise errors.BpffsMissing(
        f"{pin_dir} is not on a BPF file system: the capture could not outlive the agent.",
        remedy=f"Run 'mount -t bpf bpf {BPFFS}' and choose a directory below it.",
        path=str(pin_dir),
    )


def _is_on_bpffs(path: Path) -> bool:
    """By the longest mount point that is a prefix of the path; the last mount on it counts."""
    best, kind = -1, ""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        mount_point = left.split()[4].encode().decode("unicode_escape")
        if path.is_relative_to(mount_point) and len(mount_point) >= best:
            best, kind = len(mount_point), right.split()[0]
    return kind == "bpf"
