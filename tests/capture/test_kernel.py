"""A kernel that cannot capture is refused with what to do about it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cdp.agent.capture import errors, kernel

ROOT_CAPABILITIES = "CapEff:\t000001ffffffffff\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, text in {
        "proc/self/status": f"Name:\tx\n{ROOT_CAPABILITIES}",
        "sys/kernel/security/lockdown": "none [integrity] confidentiality\n",
        "sys/kernel/btf/vmlinux": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_an_ordinary_kernel_will_do(root: Path) -> None:
    kernel.check_environment(root)
    (root / "sys/kernel/security/lockdown").unlink()
    kernel.check_environment(root)


def test_without_privilege(root: Path) -> None:
    (root / "proc/self/status").write_text("CapEff:\t00000000a80425fb\n")
    with pytest.raises(errors.PrivilegeMissing, match="root"):
        kernel.check_environment(root)


def test_in_lockdown(root: Path) -> None:
    (root / "sys/kernel/security/lockdown").write_text("none integrity [confidentiality]\n")
    with pytest.raises(errors.KernelLockedDown, match="lockdown=integrity"):
        kernel.check_environment(root)


def test_without_btf(root: Path) -> None:
    (root / "sys/kernel/btf/vmlinux").unlink()
    with pytest.raises(errors.KernelUnsupported, match="CONFIG_DEBUG_INFO_BTF"):
        kernel.check_environment(root)


def test_pins_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(errors.BpffsMissing, match="mount -t bpf"):
        kernel.ensure_bpffs(tmp_path / "pins")
