"""Takeovers through the whole server: real controller, store, hub and API; the peers speak over real websockets."""

from __future__ import annotations

import asyncio
import time
import uuid
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cdp.server import messages as m
from cdp.server.errors import ReplicaInUse, StandbyBusy
from journal import wire
from journal.errors import NotInjected, StaleGeneration
from journal.position import Position
from standby.takeover.errors import SourceAlive, TakeoverActive
from tests.harness.wait import wait_until_async
from tests.server.peers import AGENT_REPORT, STANDBY_REPORT, Peer, Verb, connected
from tests.server.running import Client, Running, Writer, running

ADDRESSES = ["192.0.2.5/24", "2001:db8::5/64"]
STANDBY = {"hypervisor": "memory:///", "bridge": "br0", "management_address": "192.0.2.6/24"}


class Site:
    """A protected machine with its agent, and the standby that the server started for it."""

    def __init__(self, server: Running, machine: str, agent: Client) -> None:
        self.server, self.machine, self.agent = server, machine, agent
        self.writer = Writer(machine)
        self.done: list[str] = []
        config = server.target.configs[-1]
        self.pe = server.client(wire.authorization(config.credential, config.secret))

    async def push(self) -> Position:
        raw = self.writer.seal([(0, 0, b"x" * 512)])
        await self.agent.put(self.machine, self.writer.tip, raw)
        return self.writer.tip

    def agent_verbs(self) -> dict[str, Verb]:
        async def seal(args: dict[str, Any]) -> dict[str, Any]:
            return {"position": str(await self.push())}

        return {
            "quiesce": self._note("quiesce", {}),
            "seal": seal,
            "fence": self._note("fence", {"removed": ADDRESSES, "remaining": []}),
            "unfence": self._note("unfence", {}),
            "thaw": self._note("thaw", {}),
        }

    def pe_verbs(self) -> dict[str, Verb]:
        async def drain(args: dict[str, Any]) -> dict[str, Any]:
            path = wire.CURSOR.format(machine=self.machine, consumer="standby")
            await self.pe.ask("PUT", path, {"position": args["position"]})
            return {"applied": args["position"]}

        return {
            "drain": drain,
            "inject": self._note("inject", {"injected": ["takeover.json"]}),
            "take_address": self._note("take_address", {"held": ADDRESSES}),
            "finish_boot": self._note("finish_boot", {}),
            "abort": self._note("abort", {}),
        }

    def _note(self, name: str, answer: dict[str, Any]) -> Verb:
        async def verb(args: dict[str, Any]) -> dict[str, Any]:
            self.done.append(name)
            return answer

        return verb

    async def state(self) -> wire.MachineState:
        return msgspec.convert(
            await self.agent.ask("GET", wire.MACHINE.format(machine=self.machine)), wire.MachineState
        )

    async def status(self) -> m.MachineStatus:
        return msgspec.convert(await self.server.operator.ask("GET", m.MACHINE.format(name="db1")), m.MachineStatus)

    async def start(self, **request: Any) -> dict[str, Any]:
        started: dict[str, Any] = await self.server.operator.ask(
            "POST", m.MACHINE_TAKEOVERS.format(name="db1"), {"mode": "planned"} | request
        )
        return started

    async def until(self, record: dict[str, Any], *states: str) -> dict[str, Any]:
        async with asyncio.timeout(20):
            while record["state"] not in states and record["stalled"] is None:
                record = await self.server.operator.ask(
                    "GET", m.TAKEOVER.format(id=record["id"]), after_version=record["version"], wait_s=5
                )
        return record

    async def ready(self, agent: Peer, pe: Peer) -> None:
        now = time.time()
        await agent.report(msgspec.structs.replace(AGENT_REPORT, captured_at_s=now, sealed_at_s=now))
        await self.ready_standby(pe)

    async def ready_standby(self, pe: Peer) -> None:
        applied = str(self.writer.tip)
        await pe.report(msgspec.structs.replace(STANDBY_REPORT, applied=applied, applied_at_s=time.time()))


async def make_site(server: Running) -> Site:
    machine, agent = await server.protected(service_addresses=ADDRESSES, standby=STANDBY, quiesce="none", silence_s=0.3)
    return Site(server, machine, agent)


async def taken_over(site: Site) -> dict[str, Any]:
    """A planned takeover up to ``running``."""
    await site.push()
    async with (
        connected(site.server, site.agent, site.machine, verbs=site.agent_verbs()) as agent,
        connected(site.server, site.pe, site.machine, "pe", site.pe_verbs()) as pe,
    ):
        await site.ready(agent, pe)
        record = await site.start()
        await wait_until_async(lambda: "finish_boot" in site.done, 15, "the kexec")
        await pe.socket.close()
        async with connected(site.server, site.agent, site.machine, taken_over=record["id"]) as replica:
            await replica.report(msgspec.structs.replace(AGENT_REPORT, state="taken-over"))
            return await site.until(record, "running", "failed", "rolled-back")


async def test_a_planned_takeover_and_back(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        site = await make_site(server)
        assert server.target.states[site.machine] == "running"
        record = await taken_over(site)
        assert record["state"] == "running", record
        assert (site.done[:2], site.done[-1]) == (["quiesce", "fence"], "finish_boot")
        assert set(site.done[2:-1]) == {"inject", "take_address"}
        assert record["downtime_s"] > 0
        assert {"quiesce", "seal", "fence", "drain", "inject", "ip-drift", "finish-boot", "probe"} <= set(
            record["phase_seconds"]
        )
        # the source is out: its generation, its addresses, its standby's domain are not its own any more
        state = await site.state()
        assert (state.fenced, state.generation) == (True, 2)
        with pytest.raises(StaleGeneration):
            await site.push()
        for act in ("stop", "remove", "define"):
            with pytest.raises(StandbyBusy):
                await server.operator.ask("POST", m.STANDBY.format(name="db1"), {"act": act})
        with pytest.raises(TakeoverActive):
            await site.start()
        # a PE that came up on the taken-over disks would seed over them: it gets nothing to write
        tip = state.tip
        for path, query in (
            (wire.FEED, {"after": tip}),
            (wire.IMAGE, {"at": tip, "disk": "0", "offset": "0", "length": "4096"}),
            (wire.HASHES, {"disk": "0", "offset": "0", "length": "4096", "chunk": "4096"}),
        ):
            with pytest.raises(ReplicaInUse):
                await site.pe.ask("GET", path.format(machine=site.machine), **query)
        status = await site.status()
        assert (status.side, status.standby_state) == ("standby", "running")
        async with server.operator.session.get("/metrics") as got:
            metrics = await got.text()
        assert 'cdp_takeover_phase_seconds{machine="db1",phase="probe"}' in metrics

        credential = server.target.configs[-1].credential
        async with connected(server, site.agent, site.machine, verbs=site.agent_verbs()):
            back = await server.operator.ask("POST", m.ROLLBACK.format(id=record["id"]))
            back = await site.until(back, "rolled-back", "failed")
        assert back["state"] == "rolled-back", back
        assert site.done[-2:] == ["unfence", "thaw"]
        state = await site.state()
        assert (state.fenced, state.generation) == (False, 3)
        assert server.target.states[site.machine] == "running"
        assert server.target.configs[-1].credential != credential
        site.writer = Writer(site.machine, 3, Position.parse(record["cut"]))
        await site.push()
        actions = [line["action"] for line in await server.operator.ask("GET", m.AUDIT)]
        assert {"planned takeover", "roll takeover back", "protect", "join"} <= set(actions)


async def test_a_server_that_restarts_still_knows_who_is_fenced(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        site = await make_site(server)
        record = await taken_over(site)
        headers, target = dict(site.agent.session.headers), server.target
    async with running(tmp_path, target=target) as server:
        agent = server.client(headers)
        state = msgspec.convert(await agent.ask("GET", wire.MACHINE.format(machine=site.machine)), wire.MachineState)
        assert (state.fenced, state.generation) == (True, 2)
        committed = await server.operator.ask("POST", m.COMMIT.format(id=record["id"]))
        assert committed["state"] == "committed"


async def test_a_failure_before_the_fence_leaves_the_source_alone(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        site = await make_site(server)
        await site.push()
        verbs = site.agent_verbs()

        async def cannot(args: dict[str, Any]) -> dict[str, Any]:
            raise StaleGeneration("The database does not stop.", remedy="Look at it.")

        verbs["quiesce"] = cannot
        async with (
            connected(server, site.agent, site.machine, verbs=verbs) as agent,
            connected(server, site.pe, site.machine, "pe", site.pe_verbs()) as pe,
        ):
            await site.ready(agent, pe)
            record = await site.until(await site.start(), "failed", "running")
        assert record["state"] == "failed"
        assert record["reason"]["sentence"] == "The database does not stop."
        assert "thaw" in site.done
        state = await site.state()
        assert (state.fenced, state.generation) == (False, 1)
        await site.push()


async def test_a_pe_that_restarts_before_the_kexec_is_injected_again(tmp_path: Path) -> None:
    """It forgets its injection twice: when it is told to start the system, and after it has answered that it will."""
    async with running(tmp_path) as server:
        site = await make_site(server)
        await site.push()
        told: list[bool] = []
        verbs = site.pe_verbs()

        async def readable() -> bool:
            try:
                await site.pe.ask("GET", wire.FEED.format(machine=site.machine), after=str(site.writer.tip))
            except ReplicaInUse:
                return False
            return True

        async def drain(args: dict[str, Any]) -> dict[str, Any]:
            if len(told) == 3 and boots == ["boot-1"]:
                await asyncio.Event().wait()  # its domain was powered off
            site.done.append("drain")
            assert await readable(), "a PE that compares gets what it needs for that"
            return {"applied": args["position"]}

        async def finish_boot(args: dict[str, Any]) -> dict[str, Any]:
            assert not await readable(), "nothing is replayed onto disks from which the machine may run"
            told.append("inject" in site.done)
            site.done.append("finish_boot")
            if len(told) in (1, 3):
                raise NotInjected("Nothing was injected for this takeover.")
            return {}

        boots = ["boot-1"]
        verbs |= {"drain": drain, "finish_boot": finish_boot}
        async with connected(server, site.pe, site.machine, "pe", verbs) as pe:
            await site.ready_standby(pe)
            record = await site.start(mode="unplanned", source_is_down=True)
            await wait_until_async(lambda: len(told) == 2, 15, "the kexec that the PE promises")
            # What a PE reports that came up meanwhile and is given nothing.
            await pe.report(msgspec.structs.replace(STANDBY_REPORT, state="failed"))
            await wait_until_async(lambda: len(server.target.configs) == 2, 15, "the domain to boot the PE again")
        config = server.target.configs[-1]
        site.pe = server.client(wire.authorization(config.credential, config.secret))
        boots.append("boot-2")
        async with connected(server, site.pe, site.machine, "pe", verbs, boot_id=boots[-1]) as pe:
            await wait_until_async(lambda: len(told) == 4, 15, "the kexec")
            await pe.socket.close()
            async with connected(server, site.agent, site.machine, taken_over=record["id"]) as replica:
                await replica.report(msgspec.structs.replace(AGENT_REPORT, state="taken-over"))
                record = await site.until(record, "running", "failed")
        assert record["state"] == "running", record
        unprepared = [entry["act"] for entry in record["entries"] if entry["outcome"] == "unprepared"]
        assert unprepared.count("finish-boot") == 2 and "probe" in unprepared
        once = ["drain", "drain", "inject", "finish_boot"]
        assert [name for name in site.done if name != "take_address"] == [*once, *once, "finish_boot", *once]


async def test_an_unplanned_takeover_wants_evidence(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        site = await make_site(server)
        await site.push()
        async with (
            connected(server, site.agent, site.machine, verbs=site.agent_verbs()) as agent,
            connected(server, site.pe, site.machine, "pe", site.pe_verbs()) as pe,
        ):
            await site.ready(agent, pe)

            async def alive() -> None:
                while True:
                    await site.ready(agent, pe)
                    await asyncio.sleep(0.05)

            reporting = asyncio.create_task(alive())
            refused = await site.until(await site.start(mode="unplanned"), "failed", "running")
            assert (refused["state"], refused["reason"]["code"]) == ("failed", SourceAlive.code)
            reporting.cancel()
            assert (await site.state()).generation == 1
            await agent.socket.close()
            await site.ready_standby(pe)
            record = await site.start(mode="unplanned")
            await wait_until_async(lambda: "finish_boot" in site.done, 15, "the kexec")
            await pe.socket.close()
            async with connected(server, site.agent, site.machine, taken_over=record["id"]) as replica:
                await replica.report(msgspec.structs.replace(AGENT_REPORT, state="taken-over"))
                record = await site.until(record, "running", "failed")
        assert record["state"] == "running", record
        assert uuid.UUID(record["machine"]) == uuid.UUID(site.machine)
        assert (await site.state()).fenced
