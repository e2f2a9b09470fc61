"""``cdp store``: the server's store as files: check, back up, restore. For root on the server's host."""

from __future__ import annotations

import click


@click.group()
def store() -> None:
    """Check, back up and restore the server's store. For root on the server's host."""
