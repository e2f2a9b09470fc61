from __future__ import annotations

import asyncio
import random
import uuid

import pytest

from cdp.server.workers import ByteBudget, Changes
from journal.errors import Unavailable

MACHINE = uuid.uuid4()


async def test_the_budget_holds_under_any_interleaving_and_cancellation() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    budget = ByteBudget(100)
    served = 0

    async def use(amount: int, steps: int) -> None:
        nonlocal served
        async with budget.hold(amount):
            assert 0 <= budget.held_bytes <= budget.limit_bytes
            for _ in range(steps):
                await asyncio.sleep(0)
            served += 1

    tasks = [asyncio.create_task(use(rng.randint(1, 100), rng.randint(0, 5))) for _ in range(400)]
    cancelled = 0
    for _ in range(200):
        await asyncio.sleep(0)
        if rng.random() < 0.5:
            cancelled += rng.choice(tasks).cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert budget.held_bytes == 0
    assert served >= 400 - cancelled
    async with budget.hold(100):
        pass


async def test_large_requests_are_not_starved() -> None:
    budget = ByteBudget(10)
    order: list[str] = []

    async def use(name: str, amount: int) -> None:
        async with budget.hold(amount):
            order.append(name)
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        group.create_task(use("first", 5))
        group.create_task(use("large", 10))
        for number in range(5):
            group.create_task(use(f"small {number}", 5))
    assert order[:2] == ["first", "large"]


async def test_what_can_never_fit_is_refused() -> None:
    with pytest.raises(Unavailable):
        async with ByteBudget(10).hold(11):
            pass


async def test_no_news_is_lost_between_looking_and_waiting() -> None:
    changes = Changes()
    seen = changes.version(MACHINE)
    changes.notify(MACHINE)
    assert await changes.wait(MACHINE, seen, 0.0)
    seen = changes.version(MACHINE)
    assert not await changes.wait(MACHINE, seen, 0.01)
    waiting = [asyncio.create_task(changes.wait(MACHINE, seen, 10)) for _ in range(3)]
    await asyncio.sleep(0)
    changes.notify(MACHINE)
    assert await asyncio.gather(*waiting) == [True, True, True]
