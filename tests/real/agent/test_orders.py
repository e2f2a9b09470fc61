"""A planned takeover as the source sees it, and everything that may go wrong with it there."""

from __future__ import annotations

import asyncio
import os
import threading

import pytest

from cdp.agent.state import Fence, StateDir
from cdp.store import ImageReader
from journal.errors import CdpError, NoRecoveryPoint, StaleGeneration
from journal.position import Position
from standby.takeover import address
from tests.harness.wait import wait_until, wait_until_async
from tests.real.agent.agent_host import DISK_BYTES, AgentHost, agent_host
from tests.server.running import Writer

SEALS = 100
"""One in ten of them meets a beat."""

pytestmark = [pytest.mark.real, pytest.mark.timeout(150)]


class Service:
    """Writes row after row; one counts as acknowledged if the address was still there when it was on the disk."""

    def __init__(self, host: AgentHost) -> None:
        self.acked = self.written = 0
        self.ending = threading.Event()
        self._host = host

    def run(self) -> None:
        while not self.ending.is_set():
            self._host.put_row(self.written + 1)
            self.written += 1
            if len(address.holds(self._host.addresses)) == len(self._host.addresses):
                self.acked = self.written


async def following(host: AgentHost) -> None:
    host.write(0, os.urandom(4 << 20))
    await host.start()
    await host.protect()
    await host.wait_recovery_point()


async def test_fenced_and_back_again() -> None:
    async with agent_host() as host:
        await following(host)
        host.scribble(1, 50)
        assert await host.call("quiesce", mode="hooks", deadline_s=10, lease_s=60) == {}
        await host.wait_state("quiesced")
        sealed = Position.parse((await host.call("seal"))["position"])
        assert host.state().tip == str(sealed), "nothing may be added to the history between seal and fence"
        assert Position.parse((await host.call("seal"))["position"]) == sealed
        await host.check_equal(sealed, "the sealed position")

        evidence = await host.call("fence", generation=2, addresses=host.addresses)
        assert (evidence["removed"], evidence["remaining"]) == (sorted(host.addresses), [])
        assert await host.held() == []
        again = await host.call("fence", generation=2, addresses=host.addresses)
        assert (again["removed"], again["remaining"]) == (sorted(host.addresses), [])
        assert Position.parse((await host.call("seal"))["position"]) == sealed
        await host.wait_state("fenced")

        # Written to a fenced source: the rollback has to find it, and nothing else.
        host.scribble(2, 20)
        await asyncio.to_thread(host.agent.kill)
        tip = host.server.server.store.start_generation(host.machine, sealed, "rollback")
        await host.wait_state("fenced")
        assert await host.held() == []
        assert host.hook_log.read_text() == "before\n"

        await host.call("unfence", generation=2, tip=str(tip), addresses=host.addresses)
        assert await host.held() == sorted(host.addresses)
        assert host.hook_log.read_text() == "before\nafter\n"
        assert await host.call("unfence", generation=2, tip=str(tip), addresses=host.addresses) == {}
        point = await host.wait_recovery_point()
        assert point.generation == 2
        await host.check_equal(point, "after the rollback")
        report = host.report()
        assert report is not None and report.resyncs == {"dropped-writes": 1}, (
            "a comparison of everything was not needed"
        )


async def test_a_sealed_position_holds_all_that_was_written_before_the_order() -> None:
    """Also if the order comes while the beat is cutting: that cut's mark is older than the order."""
    async with agent_host(segment_s=0.1) as host:
        await following(host)
        store = host.server.server.store
        for number in range(SEALS):
            data = number.to_bytes(4, "big") * 1024
            host.write(number * 4096, data)
            sealed = Position.parse((await host.call("seal"))["position"])
            with ImageReader(store, host.machine, sealed) as image:
                assert image.read(0, number * 4096, 4096) == data, f"write {number} is not in {sealed.short}"


async def test_what_is_acknowledged_until_the_fence_is_part_of_the_cut() -> None:
    """Quiesce mode none: the service goes on, and only the loss of its address keeps it from answering."""
    async with agent_host() as host:
        await following(host)
        await host.call("quiesce", mode="none", deadline_s=10, lease_s=60)
        sealed = Position.parse((await host.call("seal"))["position"])
        service = Service(host)
        writing = asyncio.create_task(asyncio.to_thread(service.run))
        await wait_until_async(lambda: service.acked > 20, 20, "the service")
        await host.call("fence", generation=1, addresses=host.addresses)
        acked = service.acked
        service.ending.set()
        await writing
        cut = host.server.server.store.last_recovery_point(host.machine)
        assert cut is not None and cut > sealed
        assert (await host.call("seal"))["position"] == str(cut) == host.state().tip
        assert acked <= host.row_at(cut) <= service.written


async def test_a_fence_that_was_cut_short_seals_what_was_acknowledged_before_it() -> None:
    async with agent_host() as host:
        await following(host)
        await host.call("quiesce", mode="none", deadline_s=10, lease_s=60)
        await host.call("seal")
        await asyncio.to_thread(host.agent.stop)
        # As if it had been killed right after the first step of the fence.
        fence = Fence(generation=1, addresses=host.addresses, quiesced="none", sealing=True)
        StateDir(host.directory / "state").save_fence(fence)
        host.put_row(7)
        await host.start()
        await asyncio.to_thread(wait_until, lambda: not address.holds(host.addresses), 20, "the addresses' removal")
        await host.call("fence", generation=1, addresses=host.addresses)
        cut = host.server.server.store.last_recovery_point(host.machine)
        assert cut is not None and host.row_at(cut) == 7


async def test_a_fence_that_was_cut_short_is_undone_without_a_comparison() -> None:
    async with agent_host() as host:
        await following(host)
        await host.call("quiesce", mode="none", deadline_s=10, lease_s=60)
        await asyncio.to_thread(host.agent.stop)
        fence = Fence(generation=1, addresses=host.addresses, quiesced="none", sealing=True)
        fence.removed, fence.devices = host.addresses, dict.fromkeys(host.addresses, "lo")
        StateDir(host.directory / "state").save_fence(fence)
        await host.start()
        tip = host.state().tip
        await host.call("unfence", generation=1, tip=tip, addresses=host.addresses)
        await host.call("thaw")
        assert await host.held() == sorted(host.addresses)
        host.put_row(9)
        point = await host.wait_recovery_point()
        assert host.row_at(point) == 9
        report = host.report()
        assert report is not None and report.resyncs == {}


async def test_a_lease_that_runs_out_starts_what_was_stopped() -> None:
    async with agent_host() as host:
        await following(host)
        await host.call("quiesce", mode="hooks", deadline_s=10, lease_s=2)
        sealed = Position.parse((await host.call("seal"))["position"])
        await wait_until_async(lambda: host.hook_log.read_text() == "before\nafter\n", 20, "the end of the lease")
        await host.wait_state("following")
        await wait_until_async(lambda: Position.parse(host.state().tip) > sealed, 20, "segments after the hold")
        assert await host.call("thaw") == {}


async def test_a_killed_agent_remembers_that_it_quiesced() -> None:
    async with agent_host() as host:
        await following(host)
        await host.call("quiesce", mode="hooks", deadline_s=10, lease_s=60)
        await asyncio.to_thread(host.agent.kill)
        await host.wait_state("quiesced")
        await host.call("thaw")
        assert host.hook_log.read_text() == "before\nafter\n"
        await host.wait_state("following")


async def test_superseded_while_it_was_away_with_a_reboot() -> None:
    async with agent_host() as host:
        await following(host)
        sealed = await host.wait_recovery_point()
        await asyncio.to_thread(host.agent.stop)
        # What an unplanned takeover does: the fence is told by the history, and by whoever is asked.
        host.lose_everything_volatile()
        await host.start()
        await host.call("fence", generation=2, addresses=host.addresses)
        tip = host.server.server.store.start_generation(host.machine, sealed, "takeover")
        await asyncio.to_thread(host.agent.stop)
        host.lose_everything_volatile()
        await host.start()
        await host.wait_state("fenced")
        assert await host.held() == []
        host.scribble(3, 10)
        await host.call("unfence", generation=2, tip=str(tip), addresses=host.addresses)
        point = await host.wait_recovery_point()
        await host.check_equal(point, "compared after a reboot while it was fenced")
        report = host.report()
        assert report is not None and report.resyncs == {"unfenced": 1}


async def test_a_reboot_sends_only_what_differs() -> None:
    async with agent_host() as host:
        await following(host)
        host.scribble(4, 40)
        before = await host.wait_recovery_point()
        await asyncio.to_thread(host.agent.stop)
        host.lose_everything_volatile()
        host.write(10 << 20, b"written without an agent".ljust(4096, b"."))
        host.write(0, bytes(1 << 20))
        await host.start()
        point = await host.wait_recovery_point()
        await host.check_equal(point, "compared after a reboot")
        report = host.report()
        assert report is not None and report.resyncs == {"reboot-or-reinstalled": 1}
        store = host.server.server.store
        sent = sum(header.payload_bytes for header in store.headers_after(host.machine, before, 1000))
        assert sent <= 2 * (64 << 10), f"{sent} bytes were sent of a disk of {DISK_BYTES}"


async def test_another_writer_is_noticed() -> None:
    async with agent_host() as host:
        await following(host)
        sealed = Position.parse((await host.call("seal"))["position"])
        await asyncio.to_thread(host.agent.stop)
        other = Writer(str(host.machine))
        other.tip = Position.parse(host.state().tip)
        assert other.tip >= sealed
        foreign = os.urandom(4096)
        host.server.server.store.put_segment(host.machine, other.seal([(0, 8 << 20, foreign)]))
        await host.start()
        point = await host.wait_recovery_point()
        await host.check_equal(point, "after the other writer")
        report = host.report()
        assert report is not None and sum(report.resyncs.values()) >= 1


async def test_orders_that_make_no_sense() -> None:
    async with agent_host() as host:
        host.write(0, os.urandom(DISK_BYTES // 2))
        await host.start()
        with pytest.raises(CdpError, match="no verb"):
            await host.call("dance")
        with pytest.raises(CdpError, match="make no sense"):
            await host.call("fence", addresses=3)
        await host.protect()
        await host.wait_recovery_point()
        await host.call("resync", reason="test")
        with pytest.raises(NoRecoveryPoint):
            await host.call("seal")
        await host.wait_recovery_point()
        stale = Writer(str(host.machine), generation=1)
        tip = Position.parse(host.state().tip)
        host.server.server.store.start_generation(host.machine, tip, "new")
        with pytest.raises(StaleGeneration):
            host.server.server.store.put_segment(host.machine, stale.seal())
        # A newer generation that is still the source's: it goes on there by itself, and keeps its addresses.
        await wait_until_async(lambda: Position.parse(host.state().tip).seq > 0, 30, "the new generation")
        assert await host.held() == sorted(host.addresses)
