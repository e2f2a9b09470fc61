"""A protected disk that goes away and comes back: told, never taken for an unchanged one, and nothing is lost."""

from __future__ import annotations

import asyncio

import pytest

from cdp.agent.errors import DiskChanged
from tests.harness.wait import wait_until_async
from tests.real.agent.agent_host import AgentHost, agent_host

pytestmark = [pytest.mark.real, pytest.mark.timeout(150)]


def error_code(host: AgentHost) -> str | None:
    report = host.report()
    return None if report is None or report.error is None else str(report.error["code"])


async def test_a_disk_that_disappears_and_comes_back() -> None:
    async with agent_host(segment_s=0.5) as host:
        store = host.server.server.store
        await host.start()
        await host.protect()
        await host.wait_recovery_point()
        host.put_row(1)
        before = await host.wait_recovery_point()
        assert host.row_at(before) == 1

        await asyncio.to_thread(host.disk.close)
        await wait_until_async(lambda: error_code(host) == DiskChanged.code, 20, "the report that the disk is gone")
        report = host.report()
        assert report is not None and report.error is not None and report.fuzzy
        assert "no recovery points until it is as it was" in report.error["remedy"]
        last = store.last_recovery_point(host.machine)
        assert last is not None and host.row_at(last) == 1

        # An agent that starts without it refuses with a reason, again and again, and the history stays what it is.
        await asyncio.to_thread(host.agent.kill)
        await wait_until_async(lambda: host.agent.crashes, 30, "the refusal to run without the disk")
        assert str(host.disk.device) in host.agent.log_tail()
        assert store.last_recovery_point(host.machine) == last

        # Back, with a write that nobody saw: only what differs is sent, and the second before is still there.
        await asyncio.to_thread(host.disk.come_back)
        await asyncio.to_thread(host.put_row, 2)
        after = await host.wait_recovery_point(90)
        assert (host.row_at(before), host.row_at(after)) == (1, 2)
        await host.check_equal(after, "the disk that came back")
