"""``cdp-lab``: the lab's command line.

cdp-lab up           images, network, hypervisor, server, source machine
cdp-lab protect      join the source, protect it, wait until the standby is ready
cdp-lab status
cdp-lab ssh CMD      on the source machine
cdp-lab cdp ARGS     the operator's command, e.g. cdp-lab cdp status --watch
cdp-lab down         ends and deletes everything
"""

from __future__ import annotations

import os
import sys

import click

from deploy.lab import server, source_vm
from deploy.lab.lab import Lab
from journal.errors import CdpError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """A protected machine, the server and a standby on this host, in network namespaces of their own. Needs root.

    \b
    Examples:
      cdp-lab up && cdp-lab protect
      cdp-lab cdp status --watch
      cdp-lab cdp takeover source
      cdp-lab down
    """


@cli.command()
def up() -> None:
    """Bring up everything but the protection; a failure takes it all down again."""
    Lab(progress=click.echo).up()


@cli.command()
def protect() -> None:
    """Install the agent on the source, protect it, and wait until the standby is ready."""
    Lab(progress=click.echo).protect()


@cli.command()
def down() -> None:
    """End and delete everything."""
    Lab(progress=click.echo).down()


@cli.command()
def status() -> None:
    """Show what runs."""
    lab = Lab(progress=click.echo)
    states = lab.status()
    for name, state in states.items():
        click.echo(f"{name:12} {state}")
    click.echo(f"files        {lab.where.root}" if states else "there is no lab")


@cli.command(context_settings={"ignore_unknown_options": True})
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def ssh(command: tuple[str, ...]) -> None:
    """Run COMMAND, or a shell, on the source machine."""
    arguments = [*source_vm.ssh_command(Lab().where), *command]
    os.execvp(arguments[0], arguments)  # noqa: S606  the terminal is the command's now


@cli.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def cdp(arguments: tuple[str, ...]) -> None:
    """Run the operator's ``cdp`` at the server."""
    command = server.cdp_as_operator(Lab().where, *arguments)
    os.execvp(command[0], command)  # noqa: S606


def main() -> None:
    try:
        cli()
    except CdpError as error:
        click.echo(f"cdp-lab: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
