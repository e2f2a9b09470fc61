"""Bookmarks over HTTP: who may, what they name, and that a refusal leaves none and holds nobody up."""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cdp.server import messages as m
from cdp.server.bookmarks import BOOKMARKS_MAX
from cdp.store.errors import BookmarkExists, UnknownBookmark
from journal import wire
from journal.errors import BadRequest, CdpError, Forbidden, NotProtected
from journal.segment import Flags
from tests.server.peers import Verb, connected
from tests.server.running import Client, Running, Writer, running

LONG_AGO_S = int(time.time()) - 100
"""What is older than a day is folded."""


class Source:
    """A machine with three stored seconds, the middle one fuzzy, and an agent that seals another when it is told to."""

    def __init__(self, server: Running, machine: str, agent: Client) -> None:
        self.server, self.machine, self.agent = server, machine, agent
        self.writer = Writer(machine)
        self.asked: list[dict[str, Any]] = []
        self.seconds = 0

    def second(self, flags: Flags = Flags.NONE) -> str:
        raw = self.writer.seal([(0, 0, b"x" * 4096)], flags, sealed_at_s=LONG_AGO_S + self.seconds)
        self.seconds += 1
        self.server.server.store.put_segment(uuid.UUID(self.machine), raw)
        return str(self.writer.tip)

    @property
    def verbs(self) -> dict[str, Verb]:
        async def bookmark(args: dict[str, Any]) -> dict[str, Any]:
            self.asked.append(args)
            return {"position": self.second(), "hooks": "all still" if args["application"] else ""}

        return {"bookmark": bookmark}

    async def add(self, **body: Any) -> Any:
        return await self.server.operator.ask("POST", m.BOOKMARKS.format(name="db1"), body)

    async def add_own(self, machine: str | None = None, **body: Any) -> Any:
        return await self.agent.ask("POST", wire.BOOKMARKS.format(machine=machine or self.machine), body)

    async def names(self) -> list[str]:
        return [one["name"] for one in await self.server.operator.ask("GET", m.BOOKMARKS.format(name="db1"))]


async def source(server: Running) -> Source:
    machine, agent = await server.protected()
    source = Source(server, machine, agent)
    source.second()
    source.second(Flags.FUZZY)
    source.second()
    return source


async def test_of_now_and_of_then(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        source_ = await source(server)
        async with connected(server, source_.agent, source_.machine, verbs=source_.verbs):
            plain = await source_.add(name="plain", note="n", hold=True)
            still = await source_.add(name="still", application=True)
            own = await source_.add_own(name="own", application=True)
        assert source_.asked[0] == {"label": "plain", "application": False}
        assert (plain["consistency"], plain["hooks"], plain["hold"], plain["note"]) == ("crash", "", True, "n")
        assert (still["consistency"], still["hooks"]) == ("application", "all still")
        assert own["consistency"] == "application" and own["position"] == str(source_.writer.tip)
        # The agent need not be there for the past.
        then = await source_.add(name="then", at_s=float(LONG_AGO_S))
        assert then["sealed_at_s"] == LONG_AGO_S
        assert await source_.names() == ["then", "plain", "still", "own"]
        at = await server.operator.ask("GET", m.POINT.format(name="db1"), bookmark="still")
        assert at["position"] == still["position"]
        one = m.BOOKMARK.format(name="db1", id="plain")
        assert (await server.operator.ask("PATCH", one, {"hold": False}))["hold"] is False
        await server.operator.ask("DELETE", one)
        assert await source_.names() == ["then", "still", "own"]
        audit = await server.operator.ask("GET", m.AUDIT, limit=10)
        assert [line["action"] for line in audit if "bookmark" in line["action"]] == [
            *("remove bookmark", "release bookmark"),
            *["add bookmark"] * 4,
        ]


async def test_what_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        source_ = await source(server)
        other, _ = await server.protected("db2")
        async with connected(server, source_.agent, source_.machine, verbs=source_.verbs):
            with pytest.raises(CdpError, match="fuzzy") as none:
                await source_.add(name="fuzzy", at_s=LONG_AGO_S + 1.0)
            assert none.value.code == "no-recovery-point"
            for body in (
                {"name": "x", "application": True, "at_s": float(LONG_AGO_S)},
                {"name": "x", "at_s": -1.0},
                {"name": "x", "wait_s": 0.0},
                {"name": "x", "note": "n" * 1001},
                {"name": "x" * 201},
                {"name": "a/b"},
                {"name": "a\nb"},
                {"name": ""},
                {"name": "x", "colour": "red"},
            ):
                with pytest.raises(BadRequest):
                    await source_.add(**body)
            with pytest.raises(Forbidden, match="its present"):
                await source_.add_own(name="x", hold=True)
            with pytest.raises(Forbidden, match="its present"):
                await source_.add_own(name="x", at_s=float(LONG_AGO_S))
            with pytest.raises(Forbidden, match="another machine"):
                await source_.add_own(machine=other, name="x")
            with pytest.raises(Forbidden):
                await source_.agent.ask("GET", m.BOOKMARKS.format(name="db1"))
            assert source_.asked == []
            await source_.add(name="once")
            with pytest.raises(BookmarkExists):
                await source_.add(name="once", application=True)
            assert len(source_.asked) == 1, "nobody was held up for a name that is taken"
        with pytest.raises(CdpError) as away:
            await source_.add(name="away", wait_s=0.2)
        assert (away.value.code, away.value.transient) == ("peer-away", True)
        with pytest.raises(UnknownBookmark):
            await server.operator.ask("DELETE", m.BOOKMARK.format(name="db1", id="away"))
        await server.add_machine("fresh")
        with pytest.raises(NotProtected):
            await server.operator.ask("POST", m.BOOKMARKS.format(name="fresh"), {"name": "x"})
        assert await source_.names() == ["once"]


async def test_an_agent_that_cannot_leaves_no_bookmark(tmp_path: Path) -> None:
    class Broken(CdpError):
        code = "hook-failed"

    async with running(tmp_path) as server:
        source_ = await source(server)

        async def fails(args: dict[str, Any]) -> dict[str, Any]:
            raise Broken("The hook postgresql ended with exit code 1.", remedy="See [bookmark].")

        async def strange(args: dict[str, Any]) -> dict[str, Any]:
            return {"position": "yesterday"}

        async def foreign(args: dict[str, Any]) -> dict[str, Any]:
            stranger = Writer(str(uuid.uuid4()))
            stranger.seal()
            return {"position": str(stranger.tip)}

        async with connected(server, source_.agent, source_.machine) as peer:
            for verb, code in ((fails, "hook-failed"), (strange, "unexpected-frame"), (foreign, "unknown-position")):
                peer.verbs = {"bookmark": verb}
                with pytest.raises(CdpError) as raised:
                    await source_.add(name="x", application=True)
                assert raised.value.code == code and raised.value.remedy
        assert await source_.names() == []


async def test_the_oldest_recovery_point_can_be_named_although_its_segment_is_folded(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        source_ = await source(server)
        folded = server.server.store.retain(uuid.UUID(source_.machine), keep_ns=0)
        assert folded.folded_to == str(source_.writer.tip)
        made = await source_.add(name="oldest", at_s=LONG_AGO_S + 3.0)
        assert (made["position"], made["sealed_at_s"]) == (folded.folded_to, LONG_AGO_S + 2.0)
        with pytest.raises(CdpError, match="so early"):
            await source_.add(name="older", at_s=float(LONG_AGO_S))


async def test_there_is_a_limit(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        source_ = await source(server)
        store, machine = server.server.store, uuid.UUID(source_.machine)
        row = store.add_bookmark(machine, "b0", source_.writer.tip)
        with store.index.write() as txn:
            for number in range(1, BOOKMARKS_MAX):
                name = f"b{number}"
                txn.put_row("bookmarks", machine.bytes + name.encode(), msgspec.structs.replace(row, name=name))
        with pytest.raises(CdpError) as raised:
            await source_.add(name="one-more", at_s=float(LONG_AGO_S))
        assert raised.value.code == "bookmarks-full"
