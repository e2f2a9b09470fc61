"""``cdp login`` and ``cdp operators``: people and their credentials."""

from __future__ import annotations

import getpass
import hashlib
import os
import platform
import ssl
from pathlib import Path

import click
import msgspec

from cdp.cli.client import Client, connect, own_file
from cdp.cli.errors import LoginMissing, ServerUnreachable
from cdp.cli.show import json_option, moment, print_json
from cdp.server import messages as m
from journal import wire


@click.command()
@click.argument("url")
@click.argument("token")
@click.option("--name", help="Who you are, for the audit log.  [default: USER@HOST]")
def login(url: str, token: str, name: str | None) -> None:
    """Become an operator of the server at URL with a one-time TOKEN.

    The server's certificate authority is checked against the fingerprint in the token. The credential is kept in
    ~/.config/cdp/operator.json, for you alone.

    \b
    Example:
      cdp login https://backup.example.com:7443 cdp1.3f9c...
    """
    ca_pem = fetch_ca(url, token)
    client = Client(url, ca_pem, {})
    request = wire.JoinRequest(token=token, role="operator", name=name or f"{getpass.getuser()}@{platform.node()}")
    joined = client.send("POST", wire.JOIN, request, wire.JoinAnswer)
    path = own_file()
    write_credential(
        path,
        m.OperatorFile(server=client.server, ca_pem=ca_pem, credential=joined.credential, secret=joined.secret),
    )
    click.echo(f"Logged in to {client.server}; the credential is in {path}.")


@click.group()
def operators() -> None:
    """Let somebody else become an operator.

    \b
    Example:
      cdp operators token
    """


@operators.command()
@json_option
def token(as_json: bool) -> None:
    """Print a one-time login token for another operator.

    \b
    Example:
      cdp operators token
    """
    issued = connect().send("POST", m.OPERATOR_TOKENS, None, m.TokenAnswer)
    if as_json:
        print_json(issued)
        return
    click.echo(f"cdp login {issued.url} {issued.token}")
    click.echo(f"Valid once, until {moment(issued.expires_at_s)}.", err=True)


def fetch_ca(url: str, token: str) -> str:
    """The server's CA certificate, fetched without trust and then held against the token's fingerprint."""
    parts = token.split(".")
    if len(parts) != 3 or parts[0] != "cdp1":
        raise LoginMissing("This is not a token.", remedy="Copy the whole line that 'cdp operators token' printed.")
    pem = Client(url, None, {}).raw("GET", wire.CA).decode("ascii", "replace")
    try:
        fingerprint = hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).hexdigest()
    except ValueError:
        fingerprint = ""
    if fingerprint != parts[1]:
        raise ServerUnreachable(
            f"{url} is not the server that the token is from: its certificate authority is another one.",
            remedy="Check the address. If it is right, somebody is in between: do not go on.",
        )
    return pem


def write_credential(path: Path, held: m.OperatorFile) -> None:
    """For this user only, whole or not at all."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(held)))
    temporary.rename(path)
