"""``cdp agent`` and ``cdp join``: what runs on a protected machine. Imports nothing that such a machine lacks."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import click

from cdp.agent.config import DEFAULT_PATH
from cdp.cli.bookmarking import note_option, show_added, timeout_option
from cdp.cli.show import json_option
from journal import wire

_CONFIG = click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    help=f"Configuration file.  [default: {DEFAULT_PATH}]",
)


@click.group(invoke_without_command=True)
@_CONFIG
@click.pass_context
def agent(ctx: click.Context, config: Path | None) -> None:
    """Run the agent. Without a subcommand: run.

    \b
    Examples:
      cdp agent run
      cdp agent guard        # before the network starts: see cdp-agent-guard.service
      cdp agent bookmark before-deploy --application
    """
    ctx.obj = config
    if ctx.invoked_subcommand is None:
        _run(config)


@agent.command()
@_CONFIG
@click.pass_obj
def run(outer: Path | None, config: Path | None) -> None:
    """Capture, seal and push until SIGTERM or SIGINT."""
    _run(config or outer)


@agent.command()
@_CONFIG
@click.pass_obj
def guard(outer: Path | None, config: Path | None) -> None:
    """Keep the service addresses off a machine that has been fenced. Does nothing on any other."""
    from cdp.agent import fence  # noqa: PLC0415
    from cdp.agent.config import load  # noqa: PLC0415
    from cdp.agent.state import StateDir  # noqa: PLC0415

    evidence = fence.guard(StateDir(load(config or outer or DEFAULT_PATH).state_dir))
    if evidence is not None:
        click.echo(f"This machine is fenced; taken off: {', '.join(evidence.removed) or 'nothing, none was there'}.")


@agent.command()
@_CONFIG
@click.pass_obj
def detach(outer: Path | None, config: Path | None) -> None:
    """End the capture of a machine whose agent is stopped. The next start compares everything with the server."""
    from cdp.agent import main  # noqa: PLC0415
    from cdp.agent.config import load  # noqa: PLC0415

    main.detach(load(config or outer or DEFAULT_PATH))


@agent.command()
@click.argument("label")
@click.option("--application", is_flag=True, help="Hold this machine still: run its freeze hooks, freeze, cut, thaw.")
@note_option
@timeout_option
@json_option
@_CONFIG
@click.pass_obj
def bookmark(
    outer: Path | None,
    label: str,
    *,
    application: bool,
    note: str,
    timeout: float,
    as_json: bool,
    config: Path | None,
) -> None:
    """Bookmark this machine, as this machine, from here: for deployment scripts. Its agent has to be running.

    When it returns, the bookmark LABEL is there and names a recovery point of after the call. Exit code 6: not now (a
    seed, a takeover, no answer from the server or from the agent); 1: refused, or a hook failed.

    \b
    Examples:
      cdp agent bookmark before-deploy
      cdp agent bookmark nightly-$(date +%F) --application && run-the-upgrade
    """
    from cdp.agent import main  # noqa: PLC0415
    from cdp.agent.config import load  # noqa: PLC0415

    request = wire.BookmarkRequest(name=label, note=note, application=application, wait_s=timeout)
    show_added(main.bookmark(load(config or outer or DEFAULT_PATH), request), as_json)


@click.command()
@click.argument("url")
@click.argument("token")
@click.option("--disk", "disks", multiple=True, type=click.Path(path_type=Path), help="Disk to protect; repeat it.")
@click.option("--name", help="What this host calls itself.  [default: its host name]")
@click.option("--state-dir", type=click.Path(path_type=Path), default="/var/lib/cdp", show_default=True)
@_CONFIG
def join(
    url: str, token: str, *, disks: tuple[Path, ...], name: str | None, state_dir: Path, config: Path | None
) -> None:
    """Enrol this machine with the server at URL, with the one-time TOKEN that 'cdp machines add' printed.

    The server's certificate authority is checked against the fingerprint in the token before anything is sent. The
    credential is kept in the state directory; a configuration file is written if there is none.

    \b
    Examples:
      cdp join https://backup.example.com:7443 cdp1.3f9c...
      cdp join https://backup.example.com:7443 cdp1.3f9c... --disk /dev/sda --disk /dev/sdb
    """
    from cdp.agent import enrol  # noqa: PLC0415

    config = config or DEFAULT_PATH
    identity = enrol.join(url, token, disks=disks, state_dir=state_dir, config_path=config, name=name)
    click.echo(f"Joined as machine {identity.machine}. The configuration is {config}.")
    click.echo("Start the agent now: systemctl enable --now cdp-agent", err=True)


def _run(config: Path | None) -> None:
    from cdp.agent.takenover import takeover_id, yield_the_cpu  # noqa: PLC0415

    if takeover_id() is not None:
        # Before the imports: they alone take seconds of an emulated CPU.
        yield_the_cpu(to_others=True)
    from cdp.agent import main  # noqa: PLC0415
    from cdp.agent.config import load  # noqa: PLC0415

    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    main.run(load(config or DEFAULT_PATH))
