"""``cdp store``: the server's store as files: check, back up, restore. For root on the server's host."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from cdp.cli.errors import PartMissing
from cdp.cli.show import json_option, print_json

if TYPE_CHECKING:
    from cdp.server.config import Config

DEFAULT_CONFIG: Final = Path("/etc/cdp/server.toml")
_CONFIG = click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The server's configuration.  [default: /etc/cdp/server.toml if it exists]",
)


@click.group()
def store() -> None:
    """Check, back up and restore the server's store. For root on the server's host.

    \b
    Examples:
      cdp store check
      cdp store backup /mnt/elsewhere/cdp-$(date +%F)
      systemctl stop cdp-server && cdp store restore /mnt/elsewhere/cdp-2026-11-23
    """


@store.command()
@_CONFIG
@json_option
def check(config: Path | None, as_json: bool) -> None:
    """Check the index row by row, and that the files it names are there. Fast; also while the server runs.

    Payload is not read: 'cdp verify' does that. Exit codes: 0 sound, 1 not.

    \b
    Examples:
      cdp store check
      cdp store check --json | jq .problems
    """
    parts, loaded = _load(config)
    found = parts.check(Path(loaded.directory))
    if as_json:
        print_json(found)
    else:
        click.echo(
            f"{found.rows} rows, {found.machines} machines, {found.segment_files} segment files, "
            f"{found.spare_files} spare: {'sound' if not found.problems else 'NOT SOUND'}"
        )
        for problem in found.problems:
            click.echo(problem)
    if found.problems:
        raise parts.StoreUnsound(
            f"{len(found.problems)} problems were found in the store.",
            remedy="Stop the server and restore the catalogue from a backup: 'cdp store restore'.",
        )


@store.command()
@click.argument("target", type=click.Path(path_type=Path))
@_CONFIG
@json_option
def backup(target: Path, config: Path | None, as_json: bool) -> None:
    """Copy the catalogue to the directory TARGET, consistently, while the server runs.

    The catalogue is the index, the server's certificate authority, the first operator's credential, and the
    configuration: what cannot be found again in the segment files. Keep it safe: it holds the authority's key.

    \b
    Example:
      cdp store backup /mnt/elsewhere/cdp-$(date +%F)
    """
    parts, loaded = _load(config)
    made = parts.backup(Path(loaded.directory), target, config or DEFAULT_CONFIG)
    if as_json:
        print_json(made)
    else:
        click.echo(f"{target}: {made.rows} rows, {len(made.machines)} machines")


@store.command()
@click.argument("source", type=click.Path(path_type=Path, exists=True, file_okay=False))
@_CONFIG
@json_option
def restore(source: Path, config: Path | None, as_json: bool) -> None:
    """Put the catalogue from SOURCE back, on top of the segment files that are there. The server must not run.

    Segments that were stored since the backup are found in the files and taken in. The index that was there is kept
    beside the new one. Every standby compares its disks with the store afterwards, by itself.

    \b
    Example:
      systemctl stop cdp-server && cdp store restore /mnt/elsewhere/cdp-2026-11-23 && systemctl start cdp-server
    """
    parts, loaded = _load(config)
    adopted = parts.restore(source, Path(loaded.directory), map_bytes=loaded.store.map_bytes)
    if as_json:
        print_json(adopted)
        return
    for one in adopted:
        click.echo(f"{one.machine}: at {one.tip}; {one.segments} segments and {one.files} files were not in the backup")


def _load(config: Path | None) -> tuple[Any, Config]:
    try:
        from cdp.server import config as configuration  # noqa: PLC0415
        from cdp.store import backup as parts  # noqa: PLC0415
    except ImportError as error:
        raise PartMissing(
            f"The server's part is not installed ({error}).", remedy="Install it: pip install 'cdp-standby[server]'."
        ) from error
    return parts, configuration.load(config)
