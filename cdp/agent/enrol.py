"""Joining: a one-time token becomes this machine's identity.

1. GET the server's CA certificate, unverified: nothing is sent, and nothing is believed yet
2. its SHA-256 must be the fingerprint in the token, which came another way (a person's hands)
3. POST the token over a connection that trusts exactly that CA
4. ca.pem, then the identity (0600), then agent.toml: only the last makes an agent that can run
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import socket
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import aiohttp
import msgspec

from cdp.agent.client import raise_answer, tls_context
from cdp.agent.config import DEFAULT_PATH, template
from cdp.agent.errors import JoinFailed, ServerUnreachable
from cdp.agent.state import Identity, StateDir, write_file
from cdp.agent.takenover import MARKER
from journal import wire

TIMEOUT_S: Final = 30.0
CA_BYTES_MAX: Final = 64 << 10
_TOKEN = re.compile(r"cdp1\.([0-9a-f]{64})\.([A-Za-z0-9_-]+)")


def join(
    url: str,
    token: str,
    *,
    disks: Sequence[Path] = (),
    state_dir: Path = Path("/var/lib/cdp"),
    config_path: Path = DEFAULT_PATH,
    name: str | None = None,
) -> Identity:
    """Enrol this machine at ``url`` (``https://host:port``). An existing configuration file is kept. Blocks.

    Raises ``JoinFailed``, ``ServerUnreachable`` or what the server answers (token used, expired, of another role).
    """
    url = url.rstrip("/")
    identity = asyncio.run(_join(url, token, state_dir, name or socket.gethostname()))
    # Whatever this machine was before, it is a source of its own now.
    StateDir(state_dir).save_fence(None)
    MARKER.unlink(missing_ok=True)
    if not config_path.exists():
        config_path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        content = template(url, list(disks) or default_disks())
        write_file(config_path, content.encode(), mode=0o644, durable=True)
    return identity


async def _join(url: str, token: str, state_dir: Path, name: str) -> Identity:
    match = _TOKEN.fullmatch(token.strip())
    if match is None:
        raise JoinFailed(
            "This is not a join token (cdp1.<fingerprint>.<secret>).", remedy="Copy it again, in one piece."
        )
    if not url.startswith("https://"):
        raise JoinFailed(f"{url} is not an https:// URL.", remedy="Use the URL that 'cdp machines add' printed.")
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    try:
        async with aiohttp.ClientSession(timeout=timeout) as stranger, stranger.get(url + wire.CA, ssl=False) as answer:
            pem = await answer.content.read(CA_BYTES_MAX)
        check_fingerprint(pem, match[1], url)
        state = StateDir(state_dir)
        state.create()
        write_file(state.ca_file, pem, mode=0o644, durable=True)
        request = wire.JoinRequest(token=token.strip(), role="agent", name=name)
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.post(url + wire.JOIN, data=msgspec.json.encode(request), ssl=tls_context(state.ca_file)) as answer,
        ):
            raw = await answer.read()
            if answer.status >= 300:
                raise_answer(answer.status, raw)
    except (aiohttp.ClientError, OSError) as error:
        raise ServerUnreachable(
            f"{url} does not answer: {error}.", remedy="Check the URL, the network, and that 'cdp server' runs."
        ) from error
    joined = msgspec.json.decode(raw, type=wire.JoinAnswer)
    if joined.machine is None:
        raise JoinFailed("The token is not one for a machine.", remedy="Use the one that 'cdp machines add' prints.")
    identity = Identity(
        machine=joined.machine, name=name, server=url, credential=joined.credential, secret=joined.secret
    )
    state.save_identity(identity)
    return identity


def check_fingerprint(pem: bytes, fingerprint: str, url: str) -> None:
    """Raise ``JoinFailed`` unless the certificate is the one that the token names (SHA-256 of its DER form)."""
    try:
        der = ssl.PEM_cert_to_DER_cert(pem.decode("ascii"))
    except (ValueError, UnicodeDecodeError) as error:
        raise JoinFailed(f"{url} sends no CA certificate.", remedy="Check the URL: is that the CDP server?") from error
    if not hmac.compare_digest(hashlib.sha256(der).hexdigest(), fingerprint):
        raise JoinFailed(
            f"{url} is not the server that issued this token: its CA has another fingerprint.",
            remedy="Check the URL. If it is right, somebody may be in between: do not go on.",
        )


def default_disks() -> list[Path]:
    """The disk below the root file system: what most people mean."""
    from cdp.agent.spool import backing_disks  # noqa: PLC0415 (the CLI joins without loading numpy)

    names = [Path(f"/sys/dev/block/{major}:{minor}").resolve().name for major, minor in backing_disks(Path("/"))]
    return [Path("/dev") / name for name in sorted(names)] or [Path("/dev/vda")]
