"""``cdp``: one command, a module per group of verbs.

Exit codes:

    0    done
    1    refused or failed; a sentence and a remedy are on standard error
    2    wrong usage
    3    the server cannot be reached
    4    no credential, or one that may not do this
    5    a takeover or rollback ended otherwise than was asked for
    6    failed for now: the same command may succeed later
    130  interrupted

Subcommands are imported when they are used, because a protected machine has only what the agent needs.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any, Final

import click

from cdp.cli.errors import LoginMissing, NotAsAsked, ServerUnreachable
from journal.errors import CdpError, Forbidden, Unauthorized

_MODULES: Final = {
    "agent": ("cdp.cli.agent", "agent", "Run the agent on a protected machine."),
    "audit": ("cdp.cli.machines", "audit", "Show who did what."),
    "bookmark": ("cdp.cli.bookmark", "bookmark", "Name recovery points, application-consistent ones too."),
    "commit": ("cdp.cli.takeover", "commit", "Make a takeover final."),
    "cp": ("cdp.cli.files", "cp", "Copy files out of a machine as it was at any second."),
    "export": ("cdp.cli.export", "export", "Serve a machine's disks as they were at any second, over NBD."),
    "compare": ("cdp.cli.compare", "compare", "Prove that source, store and standby hold the same."),
    "join": ("cdp.cli.agent", "join", "Enrol this machine with a server."),
    "limit": ("cdp.cli.limit", "limit", "Limit what agents send, maybe at certain hours."),
    "login": ("cdp.cli.login", "login", "Become an operator of a server."),
    "ls": ("cdp.cli.files", "ls", "List a directory of a machine as it was at any second."),
    "machines": ("cdp.cli.machines", "machines", "List, add and remove machines."),
    "operators": ("cdp.cli.login", "operators", "Let somebody else become an operator."),
    "pe": ("cdp.cli.pe", "pe", "Build what a standby boots."),
    "points": ("cdp.cli.points", "points", "List recovery points."),
    "protect": ("cdp.cli.protect", "protect", "Start or change the protection of a machine."),
    "recover": ("cdp.cli.recover", "recover", "Write a disk as it was at any second."),
    "retention": ("cdp.cli.retention", "retention", "Show or change how much of a journal is kept."),
    "retry": ("cdp.cli.takeover", "retry", "Try again what has stalled in a takeover."),
    "rollback": ("cdp.cli.takeover", "rollback", "Go back to the source after a planned takeover."),
    "server": ("cdp.cli.server", "server", "Run the backup server."),
    "standby": ("cdp.cli.protect", "standby", "Define, start, stop or remove a standby."),
    "status": ("cdp.cli.status", "status", "Show how everything is."),
    "store": ("cdp.cli.store", "store", "Check, back up and restore the server's store."),
    "takeover": ("cdp.cli.takeover", "takeover", "Move a machine to its standby."),
    "takeovers": ("cdp.cli.takeover", "takeovers", "List the takeovers of a machine."),
    "verify": ("cdp.cli.verify", "verify", "Read everything that is stored and check it."),
}


class LazyGroup(click.Group):
    """Knows the names and one-line helps of its commands without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return sorted(_MODULES)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:  # noqa: ARG002
        if name not in _MODULES:
            return None
        module, attribute, _ = _MODULES[name]
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_) for name, (_, _, help_) in sorted(_MODULES.items())])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="cdp-standby", prog_name="cdp")
def cli() -> None:
    """Hot standby for machines that must not stop.

    \b
    A machine of your own, from nothing to a standby:
      server$  cdp server run                        # or: systemctl start cdp-server
      server$  cdp machines add db1                  # prints the line for db1
      db1$     cdp join https://server:7443 cdp1....
      server$  cdp pe build
      server$  cdp protect db1 --service-address 10.0.0.5/24 --probe postgresql:5432 \\
                 --hypervisor qemu+ssh://kvm1/system --bridge br0 --standby-address 10.0.0.6/24
      server$  cdp status db1 --watch
      server$  cdp takeover db1

    \b
    Exit codes:
      0  done                              4    not allowed: log in first
      1  refused or failed; see stderr     5    a takeover ended otherwise than asked for
      2  wrong usage                       6    failed for now; may succeed later
      3  the server cannot be reached      130  interrupted
    """


def main() -> None:
    """The entry point: runs the command and turns every ending into an exit code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    try:
        result: Any = cli.main(arguments, prog_name="cdp", standalone_mode=False)
    except click.exceptions.Abort:
        return 130
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except CdpError as error:
        click.echo(f"cdp: {error.sentence}", err=True)
        if error.remedy:
            click.echo(f"     {error.remedy}", err=True)
        return exit_code(error)
    except BrokenPipeError:
        return 0
    except KeyboardInterrupt:
        return 130
    return result if isinstance(result, int) else 0


def exit_code(error: CdpError) -> int:
    match error:
        case ServerUnreachable():
            return 3
        case LoginMissing() | Unauthorized() | Forbidden():
            return 4
        case NotAsAsked():
            return 5
        case _:
            return 6 if error.transient else 1


if __name__ == "__main__":
    main()
