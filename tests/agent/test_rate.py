"""The token bucket with a clock of its own: rates hold over time, changes and lifted limits take effect at once."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from cdp.agent.errors import LimitExceeded
from cdp.agent.rate import BURST_S, LOOK_S, SHOWN_S, Bucket, Lift
from cdp.agent.status import Status

RATE = 1_000_000.0
PIECE = 256 << 10


class Time:
    """Sleeping is what makes it go on. ``at_wake``: done once, when the time has come."""

    def __init__(self) -> None:
        self.now = 100.0
        self.events: list[tuple[float, object]] = []

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        assert 0 < seconds <= LOOK_S
        self.now += seconds


@dataclass
class FakeSpool:
    bytes: int = 0
    bytes_max: int = 1000


def bucket(time: Time, rate: float | None) -> Bucket:
    return Bucket(rate, clock=time.clock, sleep=time.sleep)


async def send(held: Bucket, time: Time, total: int, piece: int = PIECE) -> float:
    """Seconds that it takes."""
    began = time.now
    for _ in range(total // piece):
        await held.take(piece)
    return time.now - began


@pytest.mark.parametrize("piece", [1000, PIECE, 4 << 20])
async def test_the_rate_holds_whatever_the_pieces_are(piece: int) -> None:
    time = Time()
    total = 40 << 20
    took = await send(bucket(time, RATE), time, total, piece)
    assert (total - piece) / RATE - BURST_S - 0.01 <= took <= total / RATE * 1.01


async def test_without_a_limit_nobody_waits() -> None:
    time = Time()
    assert await send(bucket(time, None), time, 1 << 30) == 0


async def test_a_pause_saves_up_no_more_than_a_burst() -> None:
    time = Time()
    held = bucket(time, RATE)
    time.now += 3600
    took = await send(held, time, 10_000_000, 10_000)
    assert took == pytest.approx(10 - BURST_S, abs=0.05)


async def test_a_new_rate_counts_at_once_and_old_debts_do_not() -> None:
    time = Time()
    held = bucket(time, 64_000)
    await held.take(4 << 20)  # a minute of debt
    held.set_rate(RATE)
    assert await send(held, time, 1_000_000, 100_000) <= 1 + BURST_S
    held.set_rate(None)
    assert await send(held, time, 1 << 30) == 0
    held.set_rate(RATE)
    assert await send(held, time, 2_000_000, 100_000) >= 1.5


async def test_a_full_spool_borrows_until_it_is_emptier_and_says_so() -> None:
    time = Time()
    held, spool, status = bucket(time, RATE), FakeSpool(), Status(boot_id="boot")
    held.lift, status.sending = Lift(spool, lambda: False), held
    assert await send(held, time, 4 * PIECE) > 0.5
    assert held.borrowed_bytes == 0

    spool.bytes = 501
    borrowed = await send(held, time, 40 * PIECE)
    assert borrowed < 0.5
    assert held.borrowed_bytes >= 38 * PIECE
    report = status.report()
    assert report.borrowed_bytes == held.borrowed_bytes
    assert report.error is not None
    assert report.error["code"] == LimitExceeded.code
    assert status.state == "starting", "a limit that is exceeded is no failure"

    spool.bytes = 300  # below where it began, above where it ends
    assert await send(held, time, 10 * PIECE) < 0.5
    spool.bytes = 250
    assert status.report().error is not None, "a look that comes a moment later must see it too"
    assert await send(held, time, 10 * PIECE) > 2
    time.now += SHOWN_S
    assert status.report().error is None


async def test_a_planned_takeover_is_not_slowed_down() -> None:
    time = Time()
    held = bucket(time, RATE)
    quiesced = False
    held.lift = Lift(FakeSpool(), lambda: quiesced)
    assert await send(held, time, 4 * PIECE) > 0.5
    quiesced = True
    assert await send(held, time, 400 * PIECE) < 0.5
    assert not held.exceeded
