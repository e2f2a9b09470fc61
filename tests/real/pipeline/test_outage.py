"""What cannot be journalled is resynchronised: a server that stays away too long, and a capture that was lost."""

from __future__ import annotations

import os

import pytest

from journal.segment import Flags
from tests.harness.loop import drop_caches
from tests.harness.plant import Plant, new_seed
from tests.harness.wait import wait_until

pytestmark = [pytest.mark.real, pytest.mark.timeout(240)]

SIZES = (96 << 20, 64 << 20)
SPOOL_BYTES = 32 << 20
OUTAGE_BYTES = 8 * SPOOL_BYTES
CHUNK_BYTES = 64 << 10
"""The smallest unit in which a resync by comparison sends."""


def test_a_server_away_for_longer_than_the_spool_holds() -> None:
    seed = new_seed()
    with Plant(sizes=SIZES, spool_bytes=SPOOL_BYTES) as plant:
        plant.start_all()
        before = plant.wait_recovery_point()
        churn = plant.churn("load", seed, 200, "mixed")
        churn.start()
        plant.server.kill_for_good()
        written = plant.written_bytes()
        wait_until(lambda: plant.written_bytes() - written > OUTAGE_BYTES, 90, "more writes than the spool holds")
        assert plant.spooled_bytes() <= SPOOL_BYTES, "the spool is bounded"
        plant.start_server()
        fifty = churn.operations + 50
        wait_until(lambda: churn.operations > fifty, 30, "load after the outage")
        churn.stop()
        last = plant.settle(deadline_s=60)
        plant.wait_applied(last)
        since = [header for header in plant.history() if header.position > before]
        assert any(header.flags & Flags.FUZZY for header in since)
        for position in plant.recovery_points():
            if before < position < last and plant.sealed_ns(position) > churn.started_ns:
                pair = plant.recover_all(position)
                churn.explain(pair, plant.sealed_ns(position))
        plant.check_ends_equal(last, plant.recover_all(last))
        plant.check_no_crash()


def test_a_lost_capture_is_resynchronised_by_what_differs_only() -> None:
    with Plant(sizes=SIZES) as plant:
        for disk in plant.disks:
            disk.device.write_bytes(os.urandom(disk.size_bytes))
        plant.start_all()
        plant.wait_recovery_point()
        before = plant.settle()
        plant.wait_applied(before)
        plant.stop_agent()
        plant.lose_capture()
        touched = 0
        for disk in plant.disks:
            with disk.device.open("r+b", buffering=0) as device:
                for offset in range(3 << 20, disk.size_bytes, 16 << 20):
                    device.seek(offset)
                    device.write(os.urandom(8192))
                    touched += 1
            drop_caches(disk.device)
        plant.start_agent()
        last = plant.settle(deadline_s=60)
        plant.wait_applied(last)
        since = [header for header in plant.history() if header.position > before]
        assert any(header.flags & Flags.FUZZY for header in since), "a lost capture went unnoticed"
        sent = sum(header.payload_bytes for header in since)
        print(f"{touched} places touched, {sent} bytes sent of {sum(SIZES)}")
        assert touched * 8192 <= sent <= touched * CHUNK_BYTES
        assert sum(plant.agent_report().resyncs.values()) >= 1
        plant.check_ends_equal(last, plant.recover_all(last))
        plant.check_no_crash()
