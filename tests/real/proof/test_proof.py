"""Compare, verify and repair over the real path: capture, agent, server, replay, loop disks, a load that goes on."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest

from cdp.server import proof_messages as pm
from cdp.store.record import ALIGN_BYTES, MAGIC, RECORD_HEADER_BYTES
from journal.segment import HEADER_BYTES
from tests.harness.loop import drop_caches
from tests.harness.observed import NAME
from tests.harness.plant import Plant, new_seed
from tests.harness.wait import wait_until
from tests.real.capture.rig import write_direct
from tests.store.test_damage import flip

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

SIZES = (160 << 20, 64 << 20)
PART = 64 << 10
T = TypeVar("T")
A = TypeVar("A", pm.VerifyAnswer, pm.CompareAnswer)


def test_all_three_agree_while_the_source_writes_and_what_differs_is_found_exactly() -> None:
    rng = random.Random(new_seed())
    with Plant(sizes=SIZES) as plant:
        plant.start_all()
        plant.wait_recovery_point()
        churn = plant.churn("load", rng.getrandbits(32), 150, "mixed")
        churn.start()
        plant.wait_applied(plant.settle())

        under_load = compare(plant)
        print(under_load)
        assert under_load.success and under_load.standby, under_load
        assert under_load.compared_bytes > 0.9 * sum(SIZES)
        churn.stop()
        plant.wait_applied(plant.settle())

        at = rng.randrange(SIZES[1] // PART) * PART + 8192
        scribble(plant.targets[1].device, at)
        found = compare(plant)
        assert not found.success and "--reseed" in found.remedy
        assert found.differing == [pm.Differing(with_what="standby", disk=1, offset=at - 8192, length=PART)]
        plant.client.ask("POST", pm.RESEED.format(name=NAME))
        wait_until(lambda: plant.client.cursor(plant.machine, "standby") is None, 20, "the standby's new seed")
        plant.wait_applied(plant.settle())
        mended = compare(plant)
        assert mended.success, mended

        repair(plant)
        again = compare(plant)
        assert again.success, again
        plant.check_no_crash()


def test_an_older_copy_of_the_server_is_noticed_and_nothing_diverges() -> None:
    seed = new_seed()
    with Plant(sizes=(64 << 20,)) as plant:
        plant.start_all()
        plant.wait_recovery_point()
        directory, copy = plant.work_dir / "server", plant.work_dir / "copy"
        churn = plant.churn("before", seed, 100, "mixed")
        churn.start()
        plant.wait_applied(plant.settle())
        plant.server.stop()
        shutil.copytree(directory, copy)
        plant.start_server()
        newest = plant.settle()
        plant.wait_applied(newest)
        churn.stop()
        plant.wait_applied(plant.settle())

        # The standby is away: it would go on at an old cursor, with blocks that the older store never knew.
        plant.replay.stop()
        plant.server.stop()
        shutil.rmtree(directory)
        copy.rename(directory)
        plant.start_server()
        wait_until(lambda: plant.agent_report().resyncs.get("server-lost-segments"), 60, "the agent's verdict")
        plant.start_replay()
        last = plant.settle(60)
        plant.wait_applied(last)
        plant.check_ends_equal(last, plant.recover_all(last))
        plant.check_no_crash()


def repair(plant: Plant) -> None:
    """A byte of the store flips, of something that is not overwritten later; the source sends what is lost again."""
    write_direct(plant.disks[1].device, 0, os.urandom(16 << 20))  # more in a second than the load has written
    plant.wait_applied(plant.settle())
    assert verify(plant).success
    damage_the_largest(plant.work_dir / "server" / "store" / "segments")
    found = verify(plant, repair=True)
    print(found)
    assert found.damaged == 1 and "again" in found.repair
    (line,) = found.damages
    assert line.until_s is None and line.lost_bytes
    wait_until(lambda: plant.agent_report().resyncs.get("dropped-writes"), 30, "the resync of what is lost")
    last = plant.settle(60)
    plant.wait_applied(last)
    plant.check_ends_equal(last, plant.recover_all(last))
    (line,) = verify(plant).damages
    assert line.until_s is not None and line.lost_bytes == 0


def compare(plant: Plant) -> pm.CompareReport:
    return proven(plant, pm.COMPARE, {}, pm.CompareAnswer, lambda answer: answer.last)


def verify(plant: Plant, *, repair: bool = False) -> pm.VerifyReport:
    return proven(plant, pm.VERIFY, {"repair": repair}, pm.VerifyAnswer, lambda answer: answer.last)


def proven(plant: Plant, path: str, body: Any, kind: type[A], result: Callable[[A], T | None]) -> T:
    plant.client.ask("POST", path.format(name=NAME), body=body)
    ended: list[T] = []

    def look() -> bool:
        answer = msgspec.json.decode(plant.client.ask("GET", path.format(name=NAME)), type=kind)
        last = result(answer)
        if answer.running is None and last is not None:
            ended.append(last)
        return bool(ended)

    wait_until(look, 60, f"the end of {path}", poll_s=0.1)
    return ended[0]


def scribble(device: Path, offset: int) -> None:
    drop_caches(device)
    with device.open("r+b", buffering=0) as disk:
        disk.seek(offset)
        before = disk.read(512)
        disk.seek(offset)
        disk.write(bytes(byte ^ 0xFF for byte in before))
        os.fsync(disk.fileno())


def damage_the_largest(segments: Path) -> None:
    """In the middle of the payload of the largest record."""
    largest = (0, Path(), 0)
    for path in segments.glob("*.seg"):
        raw = path.read_bytes()
        for at in range(0, len(raw), ALIGN_BYTES):
            if raw[at : at + 8] == MAGIC:
                largest = max(largest, (int.from_bytes(raw[at + 12 : at + 16], "little"), path, at))
    length, path, at = largest
    flip(path, at + RECORD_HEADER_BYTES + HEADER_BYTES + (length - HEADER_BYTES) // 2)
