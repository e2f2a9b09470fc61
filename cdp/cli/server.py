"""``cdp server``: the backup server's process."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from cdp.cli.errors import PartMissing
from cdp.cli.login import write_credential
from cdp.server.messages import OperatorFile

_CONFIG = click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Configuration file.  [default: /etc/cdp/server.toml if it exists]",
)


@click.group(invoke_without_command=True)
@_CONFIG
@click.pass_context
def server(ctx: click.Context, config: Path | None) -> None:
    """Run the backup server, or prepare it. Without a subcommand: run.

    At the first start the server makes its own certificate authority, its store, and the first operator's credential
    (operator.json in its directory), so that root on this host can use 'cdp' at once.

    \b
    Examples:
      cdp server run
      cdp server run --config ./server.toml
      cdp server init --output ~/.config/cdp/operator.json
    """
    ctx.obj = config
    if ctx.invoked_subcommand is None:
        _run(config)


@server.command()
@_CONFIG
@click.pass_obj
def run(outer: Path | None, config: Path | None) -> None:
    """Serve until SIGTERM or SIGINT. See deploy/server.toml for the configuration."""
    _run(config or outer)


@server.command()
@_CONFIG
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also copy the operator's credential to this file.",
)
@click.pass_obj
def init(outer: Path | None, config: Path | None, output: Path | None) -> None:
    """Make certificate authority, store and operator without serving; print the credential's file.

    Does nothing that 'cdp server run' would not do at its first start; it is for scripts that want the file first.
    """
    try:
        from cdp.server import config as configuration  # noqa: PLC0415
        from cdp.server.app import initialise  # noqa: PLC0415
    except ImportError as error:
        raise _missing(error) from error
    path = initialise(configuration.load(config or outer))
    if output is not None:
        write_credential(output, msgspec.json.decode(path.read_bytes(), type=OperatorFile))
        path = output
    click.echo(path)


def _run(config: Path | None) -> None:
    try:
        from cdp.server import main  # noqa: PLC0415
    except ImportError as error:
        raise _missing(error) from error
    main.run(config)


def _missing(error: ImportError) -> PartMissing:
    return PartMissing(
        f"The server's part is not installed ({error}).", remedy="Install it: pip install 'cdp-standby[server]'."
    )
