"""A planned takeover, a reboot of the taken-over machine, and the way back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.lab import layout, server, source_vm
from deploy.lab.errors import LabFailed
from deploy.lab.lab import Lab
from deploy.lab.layout import default_layout, host
from deploy.lab.programs import run
from tests.harness.wait import wait_until

pytestmark = [pytest.mark.vm, pytest.mark.timeout(1800)]

BOOT_S = 300.0


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    held = Lab(default_layout("cdp-vmtest"), keep_logs=Path(__file__).parents[2] / "build" / "there-and-back")
    held.down()
    try:
        held.up()
        held.protect()
        yield held
    finally:
        held.down()


def sql(lab: Lab, address: str, statement: str) -> str:
    """As the superuser of the machine at a management address."""
    command = [*source_vm.ssh_command(lab.where, address), "cd / && runuser -u postgres -- psql -qtAX"]
    return run(command, input_text=statement, deadline_s=120).strip()


def shell(lab: Lab, address: str, command: str) -> str:
    """ "" while the machine does not answer."""
    try:
        return source_vm.ssh(lab.where, command, deadline_s=60, address=address)
    except LabFailed:
        return ""


def test_there_and_back(lab: Lab) -> None:
    sql(lab, layout.SOURCE_ADDRESS, "CREATE TABLE marker (side text); INSERT INTO marker VALUES ('source')")

    there = server.cdp_json(lab.where, "takeover", layout.MACHINE, deadline_s=600)
    assert there["state"] == "running"
    assert sql(lab, layout.STANDBY_ADDRESS, "SELECT side FROM marker") == "source"
    on_standby = shell(lab, layout.STANDBY_ADDRESS, "ip -o address")
    on_source = shell(lab, layout.SOURCE_ADDRESS, "ip -o address")
    for address in layout.SERVICE_ADDRESSES:
        assert host(address) + "/" in on_standby
        assert host(address) + "/" not in on_source

    # The domain was started with the PE's kernel; it has to come back by its own boot loader.
    assert "BOOT_IMAGE=" not in shell(lab, layout.STANDBY_ADDRESS, "cat /proc/cmdline")
    shell(lab, layout.STANDBY_ADDRESS, "systemctl reboot")
    wait_until(
        lambda: "BOOT_IMAGE=" in shell(lab, layout.STANDBY_ADDRESS, "cat /proc/cmdline"),
        BOOT_S,
        "the taken-over machine's boot from its disk",
        poll_s=1.0,
    )
    wait_until(
        lambda: host(layout.SERVICE_ADDRESSES[0]) + "/" in shell(lab, layout.STANDBY_ADDRESS, "ip -o address"),
        BOOT_S,
        "the service address after the reboot",
        poll_s=1.0,
    )

    back = server.cdp_json(lab.where, "rollback", layout.MACHINE, "--yes", deadline_s=900)
    assert back["state"] == "rolled-back"
    assert sql(lab, layout.SOURCE_ADDRESS, "INSERT INTO marker VALUES ('again'); SELECT count(*) FROM marker") == "2"
    on_source = shell(lab, layout.SOURCE_ADDRESS, "ip -o address")
    for address in layout.SERVICE_ADDRESSES:
        assert host(address) + "/" in on_source
    lab.wait_ready()
