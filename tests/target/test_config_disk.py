"""What the hypervisor side writes is what the PE reads."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from journal.wire import DiskInfo
from standby.pe.config import load
from standby.spec import MachineSpec, StandbySpec
from standby.target.config_disk import DISK_BYTES, config_of, encode, target_serial

STANDBY = StandbySpec(hypervisor="qemu:///system", bridge="br0", management_address="10.0.0.6/24", gateway="10.0.0.1")
SPEC = MachineSpec(
    machine=str(uuid.UUID(int=9)),
    name="db1",
    disks=(DiskInfo(index=0, name="/dev/sda", size_bytes=1 << 30, serial="root-1"),),
    standby=STANDBY,
)


def test_the_pe_reads_what_was_written(tmp_path: Path) -> None:
    config = config_of(SPEC, STANDBY, server="https://s:7443", ca_pem="PEM", credential="id", secret="secret")
    disk = tmp_path / "disk"
    disk.write_bytes(encode(config))
    assert disk.stat().st_size == DISK_BYTES
    assert load(disk) == config
    assert config.network.mac == SPEC.mac
    assert config.network.address == "10.0.0.6/24"


def test_a_configuration_that_does_not_fit_is_refused() -> None:
    config = config_of(SPEC, STANDBY, server="https://s", ca_pem="x" * DISK_BYTES, credential="id", secret="s")
    with pytest.raises(ValueError, match="more than its disk"):
        encode(config)


@pytest.mark.parametrize(
    ("serial", "expected"),
    [
        ("WD-1234", "WD-1234"),
        ("", "cdp-disk-3"),
        ("x" * 21, "cdp-disk-3"),
        ("a b", "cdp-disk-3"),
        ("cdp-config", "cdp-disk-3"),
    ],
)
def test_a_serial_that_virtio_cannot_carry_is_replaced(serial: str, expected: str) -> None:
    assert target_serial(DiskInfo(index=3, name="/dev/sdd", size_bytes=1, serial=serial)) == expected
