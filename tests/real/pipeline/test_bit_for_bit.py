"""A database machine with data and WAL on two disks: the end is equal bit for bit, and any second is a state that a
power cut could have left. A skewed pair and a fuzzy image fail the same check, so the check can fail."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from journal.position import Position
from tests.harness import fsynclog
from tests.harness.database import DatabaseLoad, check_pair
from tests.harness.filesystem import FileSystem, ImageUnsound
from tests.harness.plant import Plant, new_seed
from tests.harness.process import ProgramFailed
from tests.harness.wait import wait_until

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]

LOAD_S = 60
WRITES_MIN = 20_000
SECONDS = 30
SECONDS_WITH_POSTGRES = 5
DISK_BYTES = 320 << 20
SKEW_NS = 3_000_000_000

Pair = tuple[Position, Position]


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_any_second_of_a_database_is_a_state_that_the_disks_had(kind: FileSystem) -> None:
    rng = random.Random(new_seed())
    with Plant(sizes=(DISK_BYTES, DISK_BYTES)) as plant:
        devices = (plant.disks[0].device, plant.disks[1].device)
        with DatabaseLoad(kind, devices, plant.namespace, plant.work_dir, plant.log_dir) as load:
            # The load runs before the protection does: the seed is that of a live machine.
            plant.start_all()
            first = plant.wait_recovery_point()
            before = plant.writes()
            began_ns = plant.sealed_ns(first)
            wait_until(lambda: time.monotonic_ns() - began_ns > LOAD_S * 10**9, LOAD_S + 30, "the load")
            # A busy machine may be late with some of its seconds.
            wait_until(lambda: len(plant.recovery_points()) > SECONDS + 10, 60, "enough recovery points", poll_s=1.0)
            load.check_running()
            writes = plant.writes() - before
            load.finish()
        last = plant.settle()
        plant.wait_applied(last)
        assert writes >= WRITES_MIN, f"only {writes} writes"
        plant.check_ends_equal(last, plant.recover_all(last))
        notes = fsynclog.Notes.read(load.notes)
        ended_ns = notes.fsynced_ns[1][-1]

        offered = [at for at in plant.recovery_points() if at <= plant.position_at(ended_ns)]
        earlier, control = rng.choice(_apart(plant, offered, ended_ns, notes))
        # The control's moment is one of them: it passes, before it fails with what is made wrong about it.
        chosen = sorted({control, *rng.sample(offered, SECONDS)})
        with_postgres = {control, *rng.sample(chosen, SECONDS_WITH_POSTGRES)}
        for at in chosen:
            verdict = _check(plant, kind, at, notes, postgres=at in with_postgres)
            assert verdict.right, f"{at.short}: {verdict}"
        print(f"{kind}: {writes} writes, {len(notes.fsynced_ns[0])} fsyncs a disk, {len(chosen)} seconds right")
        _controls(plant, kind, earlier, control, notes)


def _check(plant: Plant, kind: FileSystem, at: Position, notes: fsynclog.Notes, *, postgres: bool) -> fsynclog.Verdict:
    pair = (plant.recover(at, 0), plant.recover(at, 1))
    return _check_images(plant, kind, pair, plant.sealed_ns(at), notes, postgres=postgres)


def _check_images(
    plant: Plant,
    kind: FileSystem,
    pair: tuple[Path, Path],
    sealed_ns: int,
    notes: fsynclog.Notes,
    *,
    postgres: bool = False,
) -> fsynclog.Verdict:
    try:
        return check_pair(
            kind, pair, sealed_ns, notes, plant.namespace, plant.work_dir, plant.log_dir, postgres=postgres
        )
    finally:
        for image in pair:
            image.unlink()


def _apart(plant: Plant, offered: list[Position], ended_ns: int, notes: fsynclog.Notes) -> list[Pair]:
    """Recovery points some seconds apart between which a record was written to either disk, the later ones early enough
    for the disks to be others at the end. On a busy machine not every second has a recovery point, or a record."""
    sealed = {at: plant.sealed_ns(at) for at in offered}
    found = []
    for at in offered:
        before = [one for one in offered if sealed[one] <= sealed[at] - SKEW_NS]
        if not before or sealed[at] > ended_ns - 10**10:
            continue
        since = sealed[before[-1]] + fsynclog.FUTURE_SLACK_NS
        pairs = zip(notes.began_ns[0], notes.fsynced_ns[1], strict=False)
        if any(began > since and fsynced < sealed[at] for began, fsynced in pairs):
            found.append((before[-1], at))
    return found


def _controls(plant: Plant, kind: FileSystem, earlier: Position, at: Position, notes: fsynclog.Notes) -> None:
    """The same check on pairs that are wrong."""
    sealed_ns = plant.sealed_ns(at)

    skewed = _check_images(plant, kind, (plant.recover(earlier, 0), plant.recover(at, 1)), sealed_ns, notes)
    assert skewed.skewed, "a pair three seconds apart passed as one moment"
    assert skewed.missing

    fuzzy = (plant.recover(at, 0), plant.recover(at, 1))
    # Half of each disk as it is ten seconds later and more: what a copy without capture is.
    for disk, image in zip(plant.disks, fuzzy, strict=True):
        with disk.device.open("rb") as live, image.open("r+b") as file:
            file.write(live.read(disk.size_bytes // 2))
    try:
        verdict = _check_images(plant, kind, fuzzy, sealed_ns, notes, postgres=True)
    except (ImageUnsound, ProgramFailed, AssertionError) as error:
        print(f"the fuzzy pair is unsound: {str(error).splitlines()[0]}")
    else:
        assert not verdict.right, "a fuzzy pair passed as one moment"
