"""Configuration, enrolment, the role after a takeover, quiescing and the runtime directory's rules."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from cdp.agent import config, enrol
from cdp.agent.capture.devices import disks_under
from cdp.agent.config import QuiesceConfig
from cdp.agent.errors import ConfigInvalid, HookFailed, JoinFailed, NotJoined, SpoolOnProtectedDisk
from cdp.agent.quiesce import Quiescer
from cdp.agent.spool import backing_disks, check_not_protected
from cdp.agent.state import Fence, Identity, StateDir
from cdp.agent.takenover import takeover_id


def test_the_template_is_a_configuration_with_all_defaults() -> None:
    text = config.template("https://backup:7443", [Path("/dev/vda"), Path("/dev/vdb")])
    written = config.parse(text)
    assert written == config.AgentConfig(server="https://backup:7443", disks=[Path("/dev/vda"), Path("/dev/vdb")])
    # Uncommented, its lines say the defaults that the code has.
    spelled = "\n".join(line.removeprefix("# ") if " = " in line else line for line in text.splitlines())
    told = config.parse(spelled)
    assert told.quiesce == written.quiesce and told.metrics == written.metrics and told.copy == written.copy
    assert told.capture.pin_dir == written.capture.pin_dir and told.segment_s == written.segment_s


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('disk = "/dev/vda"', "disk"),
        ("segment_s = 0", "segment_s"),
        ("[spool]\nbytes = 1", "spool.bytes"),
        ("[metrics]\nport = -1", "metrics.port"),
        ("[capture", "agent.toml"),
    ],
)
def test_a_wrong_key_is_named(line: str, said: str) -> None:
    with pytest.raises(ConfigInvalid, match=said):
        config.parse(f'server = "https://s"\ndisks = ["/dev/vda"]\n{line}')


def test_a_token_and_a_server_that_do_not_belong_together(tmp_path: Path) -> None:
    with pytest.raises(JoinFailed, match="not a join token"):
        enrol.join("https://127.0.0.1:1", "cdp1.short", state_dir=tmp_path)
    with pytest.raises(JoinFailed, match="https"):
        enrol.join("http://127.0.0.1:1", f"cdp1.{'0' * 64}.secret", state_dir=tmp_path)
    with pytest.raises(JoinFailed, match="no CA certificate"):
        enrol.check_fingerprint(b"<html>", "0" * 64, "https://s")
    assert not list(tmp_path.iterdir())


def test_state_survives(tmp_path: Path) -> None:
    state = StateDir(tmp_path / "state")
    state.create()
    with pytest.raises(NotJoined):
        state.identity()
    identity = Identity(machine="0" * 32, name="db1", server="https://s", credential="c", secret="s")
    state.save_identity(identity)
    assert state.identity() == identity
    assert (tmp_path / "state" / "identity.json").stat().st_mode & 0o077 == 0
    assert state.fence() is None and state.addresses() == []
    fence = Fence(generation=3, addresses=["10.0.0.5/24"], quiesced="freeze", routes=[{"dst": "default"}])
    state.save_fence(fence)
    assert StateDir(tmp_path / "state").fence() == fence
    state.save_fence(None)
    assert state.fence() is None


def test_who_am_i(tmp_path: Path) -> None:
    marker, cmdline = tmp_path / "takeover.json", tmp_path / "cmdline"
    cmdline.write_text("root=/dev/vda1 quiet")
    assert takeover_id(marker, cmdline) is None
    marker.write_text('{"takeover": "t-2", "server": "https://s", "more": 1}')
    assert takeover_id(marker, cmdline) == "t-2"
    cmdline.write_text("root=/dev/vda1 cdp.takeover=t-3 quiet\n")
    assert takeover_id(marker, cmdline) == "t-3"


async def test_hooks_are_undone_when_they_fail_or_take_too_long(tmp_path: Path) -> None:
    log = tmp_path / "log"
    after = ["sh", "-c", f"echo after >> {log}"]
    good = Quiescer(QuiesceConfig(before=["sh", "-c", f"echo before >> {log}"], after=after), tmp_path)
    await good.quiesce("hooks", 10, 60)
    noted = good.noted
    assert noted is not None and noted.mode == "hooks" and noted.until_ns > time.monotonic_ns()
    await good.undo()
    assert good.noted is None and log.read_text() == "before\nafter\n"
    await good.undo()
    assert log.read_text() == "before\nafter\n"

    failing = Quiescer(QuiesceConfig(before=["sh", "-c", "echo no luck; exit 3"], after=after), tmp_path)
    with pytest.raises(HookFailed, match="exit code 3: no luck"):
        await failing.quiesce("hooks", 10, 60)
    assert failing.noted is None and log.read_text() == "before\nafter\nafter\n"

    slow = Quiescer(QuiesceConfig(before=["sleep", "1000"], after=after), tmp_path)
    began = asyncio.get_running_loop().time()
    with pytest.raises(HookFailed, match="longer than"):
        await slow.quiesce("hooks", 0.2, 60)
    assert asyncio.get_running_loop().time() - began < 10
    assert slow.noted is None and log.read_text().endswith("after\nafter\n")

    missing = Quiescer(QuiesceConfig(before=["/nonexistent"], after=[]), tmp_path)
    with pytest.raises(HookFailed, match="nonexistent"):
        await missing.quiesce("hooks", 10, 60)


def test_a_spool_on_a_protected_disk_is_refused(tmp_path: Path) -> None:
    below = backing_disks(tmp_path)
    if below:
        with pytest.raises(SpoolOnProtectedDisk):
            check_not_protected(tmp_path / "not" / "there" / "yet", below)
    check_not_protected(Path("/dev/shm"), below or {(8, 0)})
    assert disks_under(0, 1) == set()
