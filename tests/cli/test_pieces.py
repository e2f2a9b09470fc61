"""What needs no server: times, sizes, lazy commands, exit codes."""

from __future__ import annotations

import datetime
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from cdp.cli import show, times
from cdp.cli.errors import LoginMissing, NotAsAsked, ServerUnreachable
from cdp.cli.main import _MODULES, cli, exit_code
from cdp.cli.protect import Size
from journal.errors import BadRequest, CdpError, Forbidden, Unauthorized, Unavailable

NOW = datetime.datetime(2026, 11, 23, 14, 0, 0, tzinfo=datetime.timezone(datetime.timedelta(hours=2)))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("-90s", NOW.timestamp() - 90),
        ("5m", NOW.timestamp() - 300),
        ("-2h", NOW.timestamp() - 7200),
        ("@1795442730.5", 1795442730.5),
        ("13:59:58", NOW.timestamp() - 2),
        ("13:59", NOW.timestamp() - 60),
        ("2026-11-23 14:00:00", NOW.timestamp()),
        ("2026-11-23T12:00:00Z", NOW.timestamp()),
        ("2026-11-23T14:00:00.25", NOW.timestamp() + 0.25),
    ],
)
def test_times_are_read_as_people_write_them(text: str, seconds: float) -> None:
    assert times.parse(text, NOW) == pytest.approx(seconds)


def test_latest_is_no_time() -> None:
    assert times.parse("latest", NOW) is None


@given(st.text(max_size=40))
def test_any_text_is_a_time_or_wrong_usage(text: str) -> None:
    try:
        times.Time(NOW).convert(text, None, None)
    except click.BadParameter as error:
        assert "is not a time" in str(error)


@given(st.floats(0, 1e10), st.floats(0, 1e18))
def test_every_age_and_size_has_a_text(seconds: float, amount: float) -> None:
    assert show.age(seconds)
    assert show.size(amount)


def test_ages_and_sizes_are_read_easily() -> None:
    assert [show.age(value) for value in (0.25, 250, 85260, 600000)] == [
        "0.2 s",
        "4 min 10 s",
        "23 h 41 min",
        "6 d 22 h",
    ]
    assert [show.size(value) for value in (12, 1536, 3 << 30)] == ["12 B", "1.5 KiB", "3.0 GiB"]
    assert Size().convert("2G", None, None) == 2 << 30
    assert Size().convert("512MiB", None, None) == 512 << 20


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BadRequest("x"), 1),
        (ServerUnreachable("x"), 3),
        (LoginMissing("x"), 4),
        (Unauthorized("x"), 4),
        (Forbidden("x"), 4),
        (NotAsAsked("x"), 5),
        (Unavailable("x"), 6),
    ],
)
def test_exit_codes_are_those_of_the_help(error: CdpError, code: int) -> None:
    assert exit_code(error) == code


def _commands(command: click.Command, path: list[str]) -> list[list[str]]:
    found = [path]
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            found += _commands(inner, [*path, name])
    return found


def test_every_command_has_a_help_that_teaches() -> None:
    lacking = []
    for path in _commands(cli, []):
        result = CliRunner().invoke(cli, [*path, "--help"])
        assert result.exit_code == 0, path
        if len(path) == 1 and "xample" not in result.output:
            lacking.append(path)
    assert not lacking


def test_a_protected_machine_needs_no_server_packages() -> None:
    """``cdp agent`` and ``cdp join`` must not import what only the server's extra brings."""
    script = (
        "import sys\n"
        "for name in ('rich', 'lmdb', 'libvirt', 'uvloop', 'jinja2'): sys.modules[name] = None\n"
        "from cdp.cli.main import run\n"
        "for words in (['--help'], ['agent', '--help'], ['join', '--help'], ['agent', 'guard', '--help']):\n"
        "    assert run(words) == 0, words\n"
        "assert run(['server', 'run']) == 1\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "cdp-standby[server]" in done.stderr


def test_every_lazy_command_exists() -> None:
    context = click.Context(cli)
    for name in _MODULES:
        command = cli.get_command(context, name)
        assert command is not None
        assert command.help
