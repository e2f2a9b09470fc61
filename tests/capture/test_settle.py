"""When are all writes that were submitted before a moment known to have completed? With a clock of our own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cdp.agent.capture.devices import Device, from_sysfs
from cdp.agent.capture.errors import NotSettled
from cdp.agent.capture.settle import TIMEOUT_SLACK_NS, wait_settled
from tests.capture.sysfs import FakeSysfs

S = 1_000_000_000


class SteppedClock:
    """Time passes only in ``sleep``; ``on`` sees each moment first."""

    def __init__(self, on: Callable[[int], None]) -> None:
        self.now = 100 * S
        self._on = on

    def monotonic_ns(self) -> int:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += max(1, int(seconds * S))
        self._on(self.now)


@pytest.fixture
def disk(tmp_path: Path) -> tuple[Device, Path, Path]:
    sysfs = FakeSysfs(tmp_path)
    directory = sysfs.disk("sda", "8:0", queue__io_timeout="2000", inflight="       3        1")
    return from_sysfs(tmp_path, 8, 0, Path("/dev/sda")), directory / "inflight", tmp_path


async def test_an_empty_queue_counts_only_after_a_second(disk: tuple[Device, Path, Path]) -> None:
    device, inflight, sysfs = disk
    inflight.write_text("3 0\n")
    clock = SteppedClock(lambda now: None)
    await wait_settled([device], 100 * S, clock, sysfs)
    assert clock.now == 101 * S
    await wait_settled([device], 50 * S, clock, sysfs)
    assert clock.now == 101 * S


async def test_waits_for_the_writes_not_for_reads(disk: tuple[Device, Path, Path]) -> None:
    device, inflight, sysfs = disk

    def complete_at_103(now: int) -> None:
        inflight.write_text(f"5 {int(now < 103 * S)}\n")

    clock = SteppedClock(complete_at_103)
    await wait_settled([device], 100 * S, clock, sysfs)
    assert 103 * S <= clock.now < 104 * S


async def test_a_queue_that_is_never_empty_is_bounded_by_its_timeout(disk: tuple[Device, Path, Path]) -> None:
    device, _, sysfs = disk
    clock = SteppedClock(lambda now: None)
    await wait_settled([device], 100 * S, clock, sysfs)
    assert clock.now >= 102 * S + TIMEOUT_SLACK_NS


async def test_a_disk_that_goes_away(disk: tuple[Device, Path, Path]) -> None:
    device, inflight, sysfs = disk
    inflight.unlink()
    with pytest.raises(NotSettled):
        await wait_settled([device], 100 * S, SteppedClock(lambda now: None), sysfs)
