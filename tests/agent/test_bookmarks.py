"""Hooks with a guardian: the order of things, and every way in which one of them can fail. Nothing stays frozen."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cdp.agent.config import BookmarkConfig, parse
from cdp.agent.errors import ConfigInvalid, HookFailed, NothingToFreeze
from cdp.agent.freezing import SHIPPED, Freezer, mounts_on
from journal.errors import CdpError
from tests.harness.process import Program
from tests.harness.wait import wait_until

GOOD = "echo I am $NAME; echo ready; read -r _; echo frozen $NAME >> $LOG; echo frozen; cat >/dev/null"


class Stage:
    """Hooks in ``directory``; what they do is in ``log``."""

    def __init__(self, directory: Path) -> None:
        self.hooks = directory / "hooks"
        self.hooks.mkdir()
        self.runtime = directory / "run"
        self.runtime.mkdir()
        self.log = directory / "log"
        self.log.touch()

    def hook(self, name: str, body: str) -> None:
        path = self.hooks / name
        script = f"#!/bin/sh\nset -eu\nNAME={name} LOG={self.log}\n{body}\necho thawed {name} >> $LOG\n"
        path.write_text(script)
        path.chmod(0o755)

    def config(self, *names: str, freeze_s: float = 5.0, prepare_s: float = 5.0) -> BookmarkConfig:
        return BookmarkConfig(hooks=list(names), hook_dir=self.hooks, freeze=[], freeze_s=freeze_s, prepare_s=prepare_s)

    def freezer(self, config: BookmarkConfig) -> Freezer:
        return Freezer(config, self.runtime, set())

    async def bookmark(self, config: BookmarkConfig, during: Callable[[], None] = lambda: None) -> str:
        async with self.freezer(config).prepared("label") as guarded:
            await guarded.freeze()
            self.note("cut")
            during()
            return await guarded.thaw()

    def note(self, line: str) -> None:
        with self.log.open("a") as file:
            file.write(line + "\n")

    @property
    def lines(self) -> list[str]:
        return self.log.read_text().splitlines()


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


async def test_hooks_freeze_in_order_and_their_words_are_kept(stage: Stage) -> None:
    stage.hook("one", GOOD)
    stage.hook("two", GOOD + "; echo $CDP_BOOKMARK, at most $CDP_FREEZE_S s")
    said = await stage.bookmark(stage.config("one", "two"))
    assert stage.lines[:3] == ["frozen one", "frozen two", "cut"]
    assert sorted(stage.lines[3:]) == ["thawed one", "thawed two"]
    assert said.splitlines()[:3] == ["one: I am one", "two: I am two", "two: label, at most 5 s"]
    assert said.splitlines()[3].endswith(": one, two")
    assert list(stage.runtime.iterdir()) == []


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("echo the database is away; exit 3", "two ended with exit code 3: the database is away"),
        ("echo ready; read -r _; echo locked out; exit 1", "two ended with exit code 1: locked out"),
        ("cat >/dev/null", r"two was not ready within 1 s \(prepare_s\)"),
        ("echo ready; read -r _; cat >/dev/null", r"two was not frozen within 1 s \(freeze_s\)"),
        ("echo ready; read -r _; echo frozen; cat >/dev/null; exit 4", "two ended with exit code 4"),
    ],
    ids=["prepare", "freeze", "never-ready", "never-frozen", "thaw"],
)
async def test_a_hook_that_fails_leaves_nothing_frozen(stage: Stage, body: str, says: str) -> None:
    stage.hook("one", GOOD)
    stage.hook("two", body)
    with pytest.raises(HookFailed, match=says) as raised:
        await stage.bookmark(stage.config("one", "two", freeze_s=1, prepare_s=1))
    assert raised.value.remedy
    if "frozen one" in stage.lines:
        assert "thawed one" in stage.lines
    assert list(stage.runtime.iterdir()) == []


async def test_a_hook_that_ends_too_early_is_noticed(stage: Stage) -> None:
    """As when the server of a database kills the session that held its lock."""
    stage.hook("early", "echo ready; read -r _; echo frozen")
    with pytest.raises(HookFailed, match="early ended with exit code 0"):
        await stage.bookmark(stage.config("early"), lambda: wait_until(lambda: "thawed early" in stage.lines, 5, "it"))


async def test_an_agent_that_hangs_is_no_obstacle(stage: Stage) -> None:
    stage.hook("one", GOOD)
    with pytest.raises(HookFailed, match="did not thaw within 1 s"):
        await stage.bookmark(
            stage.config("one", freeze_s=1), lambda: wait_until(lambda: "thawed one" in stage.lines, 5, "the thaw")
        )


@pytest.mark.parametrize("when", ["while freezing", "while frozen"])
async def test_a_guardian_that_hangs_is_no_obstacle(stage: Stage, when: str) -> None:
    stage.hook("one", GOOD)
    if when == "while freezing":
        stage.hook("two", "echo ready; read -r _; kill -STOP $PPID; echo frozen; cat >/dev/null")
    else:
        stage.hook("two", "echo ready; read -r _; echo frozen; sleep 0.2; kill -STOP $PPID; cat >/dev/null")
    config = stage.config("one", "two", freeze_s=1, prepare_s=1)
    began = time.monotonic()
    with pytest.raises(HookFailed, match="hangs" if when == "while freezing" else "killed"):
        await stage.bookmark(config, lambda: time.sleep(0.4) if when == "while frozen" else None)
    await asyncio.to_thread(wait_until, lambda: "thawed one" in stage.lines, 5, "the thaw")
    assert time.monotonic() - began < 10


async def test_a_cancelled_bookmark_thaws(stage: Stage) -> None:
    stage.hook("one", GOOD)

    async def never() -> None:
        async with stage.freezer(stage.config("one")).prepared("label") as guarded:
            await guarded.freeze()
            await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await never()
    assert stage.lines == ["frozen one", "thawed one"]
    assert await stage.bookmark(stage.config("one"))


def test_a_killed_agent_lets_go_at_once(stage: Stage, tmp_path: Path) -> None:
    stage.hook("one", GOOD)
    script = tmp_path / "agent.py"
    script.write_text(
        textwrap.dedent(f"""
        import asyncio
        from pathlib import Path
        from cdp.agent.config import BookmarkConfig
        from cdp.agent.freezing import Freezer
        config = BookmarkConfig(hooks=["one"], hook_dir=Path({str(stage.hooks)!r}), freeze=[], freeze_s=60)
        async def main():
            async with Freezer(config, Path({str(stage.runtime)!r}), set()).prepared("label") as guarded:
                await guarded.freeze()
                await asyncio.Event().wait()
        asyncio.run(main())
        """)
    )
    agent = Program("agent", [sys.executable, str(script)], tmp_path)
    agent.start()
    wait_until(lambda: "frozen one" in stage.lines, 10, "the freeze")
    killed = time.monotonic()
    os.kill(agent.pid, signal.SIGKILL)
    wait_until(lambda: "thawed one" in stage.lines, 5, "the thaw")
    assert time.monotonic() - killed < 2
    agent.kill_for_good()
    assert (stage.runtime / "frozen.json").exists()
    asyncio.run(stage.freezer(stage.config("one")).enforce())
    assert list(stage.runtime.iterdir()) == []


async def test_what_is_refused_before_anything_is_held_up(stage: Stage) -> None:
    stage.hook("one", GOOD)
    with pytest.raises(NothingToFreeze):
        await stage.bookmark(stage.config())
    with pytest.raises(HookFailed, match="no hook 'absent'"):
        await stage.bookmark(stage.config("absent"))
    (stage.hooks / "one").chmod(0o777)
    with pytest.raises(HookFailed, match="changed by others"):
        await stage.bookmark(stage.config("one"))
    own = BookmarkConfig(freeze=[stage.runtime])
    with pytest.raises(HookFailed, match="runtime directory"):
        await stage.bookmark(own)
    away = BookmarkConfig(freeze=[Path("/absent")])
    with pytest.raises(HookFailed, match="/absent cannot be opened"):
        await stage.bookmark(away)
    memory = BookmarkConfig(freeze=[Path("/dev/shm")])
    with pytest.raises(HookFailed, match="/dev/shm cannot be frozen"):
        await stage.bookmark(memory)
    assert stage.lines == []


@pytest.mark.parametrize("wrong", ['hooks = ["../x"]', 'hooks = ["a", "a"]', "freeze_s = 0", "prepare_s = 1e9"])
def test_configuration(wrong: str) -> None:
    with pytest.raises(ConfigInvalid) as raised:
        parse(f'server = "https://h:1"\ndisks = ["/dev/vda"]\n[bookmark]\n{wrong}\n')
    assert isinstance(raised.value, CdpError)


def test_the_shipped_hooks() -> None:
    assert {path.name for path in SHIPPED.iterdir()} == {"postgresql", "mariadb"}


def test_no_disk_no_file_system() -> None:
    assert mounts_on(set()) == []
