"""``cdp pe``: what a standby boots."""

from __future__ import annotations

import os
from pathlib import Path

import click

from cdp.cli.client import SERVER_FILE
from cdp.cli.errors import PartMissing
from cdp.cli.show import json_option, print_json, size


@click.group()
def pe() -> None:
    """Build the PE: the small system that a standby boots to follow its source.

    \b
    Example:
      cdp pe build
    """


@pe.command()
@click.option(
    "--directory",
    type=click.Path(path_type=Path, file_okay=False),
    help=f"Where the server looks for it.  [default: its pe.directory, {SERVER_FILE.parent}/pe]",
)
@click.option("--config", type=click.Path(path_type=Path, dir_okay=False), help="The server's configuration file.")
@click.option("--cache-dir", type=click.Path(path_type=Path, file_okay=False), help="Where layers are kept.")
@click.option("--mirror", help="Debian mirror.  [default: $CDP_DEBIAN_MIRROR or Debian's own]")
@click.option("--refresh", is_flag=True, help="Fetch the distribution's packages again, for their security updates.")
@json_option
def build(
    *,
    directory: Path | None,
    config: Path | None,
    cache_dir: Path | None,
    mirror: str | None,
    refresh: bool,
    as_json: bool,
) -> None:
    """Build the PE image and install it for the server. Needs root and mmdebstrap.

    A running standby keeps what it booted; the next definition takes the new image: 'cdp standby stop NAME', then
    'cdp standby start NAME'.

    \b
    Examples:
      cdp pe build
      cdp pe build --refresh
    """
    try:
        from cdp.server import config as configuration  # noqa: PLC0415
        from standby.pe import image  # noqa: PLC0415
    except ImportError as error:
        raise PartMissing(
            f"The server's part is not installed ({error}).", remedy="Install it: pip install 'cdp-standby[server]'."
        ) from error
    directory = directory or configuration.load(config).pe_directory
    built = image.build(
        cache_dir, mirror=mirror, refresh=refresh, progress=lambda what: click.echo(f"{what} ...", err=True)
    )
    installed = image.install(built, directory)
    if as_json:
        print_json(
            {
                "kernel": os.fspath(installed.kernel),
                "initrd": os.fspath(installed.initrd),
                "release": installed.release,
                "digest": installed.digest,
            }
        )
        return
    click.echo(
        f"PE {installed.digest}: Linux {installed.release}, {size(installed.initrd.stat().st_size)}, {directory}"
    )
