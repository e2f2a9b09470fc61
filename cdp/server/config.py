"""``/etc/cdp/server.toml``. This module is the reference: each key, its default and why; unknown keys are errors.

``deploy/server.toml`` shows every key with its default; a test keeps it so.
"""

from __future__ import annotations

import ipaddress
import socket
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from cdp.server.errors import ConfigInvalid

DEFAULT_PATH = Path("/etc/cdp/server.toml")
DEFAULT_DIRECTORY = "/var/lib/cdp-server"
DEFAULT_PORT = 7443


class Section(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, frozen=True):
    """Base of every table."""


class Limits(Section, frozen=True):
    ingest_bytes_max: int = 256 << 20
    """Memory for segments that are being received or stored, all machines together. Four of the largest segments;
    beyond it a request waits with its body unread, which slows the sender down."""
    read_bytes_max: int = 256 << 20
    """Memory for answers (segments, image ranges) that are being read or sent."""
    request_idle_s: float = 60.0
    """A request whose body makes no progress for this long is dropped, so that it cannot hold memory for ever."""
    feed_wait_s_max: float = 60.0
    """Longest long poll; also bounds how long a dead connection stays unnoticed."""
    peers_max: int = 4096
    """Control connections. Each costs a socket and some 100 KiB."""

    def __post_init__(self) -> None:
        for name, low in (("ingest_bytes_max", 128 << 20), ("read_bytes_max", 128 << 20), ("peers_max", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} is below {low}, too little for a single segment")
        if not 1 <= self.request_idle_s <= 3600 or not 1 <= self.feed_wait_s_max <= 600:
            raise ValueError("request_idle_s must lie in 1..3600 and feed_wait_s_max in 1..600")


class Tls(Section, frozen=True):
    names: tuple[str, ...] = ()
    """Further DNS names and IP addresses that clients dial, put into the server's certificate. The host of ``url``,
    ``listen``, the host name, ``localhost`` and the loopback addresses are always there. After a change the certificate
    is issued anew."""
    certificate_days: int = 397
    """Lifetime of the server's certificate. It is renewed when a third is left, without a restart."""

    def __post_init__(self) -> None:
        if not 2 <= self.certificate_days <= 825:
            raise ValueError("certificate_days must lie in 2..825")


class StoreFiles(Section, frozen=True):
    file_bytes: int = 256 << 20
    """Size of one preallocated segment file."""
    map_bytes: int = 64 << 30
    """Address space for the index; it bounds the index, it is not allocated."""


class Dedup(Section, frozen=True):
    enabled: bool = True
    """Before a machine's first seed its agent asks which of its chunks the server has from other machines; those are
    not sent. An agent learns in this way that some machine holds a chunk which it holds itself, and nothing else.
    False: where machines of parties that distrust each other share a server; then every seed is sent whole."""
    index_mb_per_s_max: float = 32.0
    """Reading of newest images in the background, once a day, so that their chunks can be found."""

    def __post_init__(self) -> None:
        if not 0 < self.index_mb_per_s_max <= 10_000:
            raise ValueError("index_mb_per_s_max must lie in 0..10000")


class Retention(Section, frozen=True):
    """The default; 'cdp retention set' gives a machine its own."""

    keep_s: float = 86400.0
    """How long a second can be recovered before it is folded into the base image. 0: no limit by time."""
    max_bytes: int = 0
    """How much disk the journal of a machine may take. 0: no limit by bytes."""
    interval_s: float = 5.0
    """How often each machine's journal is looked at; each look costs some hundred rows of the index."""

    def __post_init__(self) -> None:
        if self.keep_s and not 1 <= self.keep_s <= 100 * 365 * 86400:
            raise ValueError("keep_s must be 0 or lie in 1 s..100 years")
        if self.max_bytes < 0 or not 0.05 <= self.interval_s <= 3600:
            raise ValueError("max_bytes must not be negative, and interval_s lie in 0.05..3600")


class Pe(Section, frozen=True):
    directory: str = ""
    """Where ``cdp pe build`` puts the PE's kernel and initramfs. Empty: ``pe`` inside ``directory``."""


class Verify(Section, frozen=True):
    mb_per_s_max: float = 50.0
    """How fast the background verification reads, in MB/s; 0: as fast as it goes. A terabyte takes six hours at 50."""
    interval_h: float = 168.0
    """How old a machine's last verification may get before it is done again. 0: only 'cdp verify' does it."""

    def __post_init__(self) -> None:
        if not 0 <= self.mb_per_s_max <= 1e6 or not 0 <= self.interval_h <= 87600:
            raise ValueError("mb_per_s_max must lie in 0..1e6 and interval_h in 0..87600")


class Config(Section, frozen=True):
    directory: str = DEFAULT_DIRECTORY
    """Everything the server keeps: its CA, the store, the PE image. Root only, on a disk with room for the journal."""
    listen: tuple[str, ...] = ()
    """Addresses to listen at. Empty: all of this host."""
    port: int = DEFAULT_PORT
    """One port for everything: agents, standbys, operators, metrics."""
    url: str = ""
    """How standbys and agents reach this server. Empty: ``https://<first of tls.names, or the host name>:<port>``."""
    token_lifetime_s: float = 3600.0
    """A join token that has not been used after this time is worthless."""
    log_level: str = "info"
    """debug, info, warning or error; to standard error, as systemd likes it."""
    limits: Limits = Limits()
    tls: Tls = Tls()
    store: StoreFiles = StoreFiles()
    dedup: Dedup = Dedup()
    retention: Retention = Retention()
    pe: Pe = Pe()
    verify: Verify = Verify()

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port {self.port} is outside 0..65535")
        if not self.directory.startswith("/"):
            raise ValueError(f"directory {self.directory!r} is not an absolute path")
        if self.log_level not in {"debug", "info", "warning", "error"}:
            raise ValueError(f"log_level {self.log_level!r} is not debug, info, warning or error")
        if self.url and not self.url.startswith("https://"):
            raise ValueError(f"url {self.url!r} does not start with https://")
        if not 1 <= self.token_lifetime_s <= 30 * 86400:
            raise ValueError("token_lifetime_s must lie in 1 s..30 days")
        for address in self.listen:
            ipaddress.ip_address(address)

    @property
    def names(self) -> tuple[str, ...]:
        """Every name and address of the server's certificate, without doubles, in a fixed order."""
        dialled = urlsplit(self.url).hostname
        always = [socket.gethostname(), "localhost", "127.0.0.1", "::1"]
        wanted = [*self.tls.names, *([dialled] if dialled else []), *self.listen, *always]
        return tuple(dict.fromkeys(name for name in wanted if name not in {"0.0.0.0", "::"}))  # noqa: S104

    @property
    def public_url(self) -> str:
        host = self.names[0]
        return self.url or f"https://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def pe_directory(self) -> Path:
        return Path(self.pe.directory or Path(self.directory) / "pe")


def load(path: Path | None) -> Config:
    """The configuration in ``path``; None: the default path if it exists, otherwise the defaults. Raises
    ``ConfigInvalid``, naming the key."""
    if path is None:
        if not DEFAULT_PATH.exists():
            return Config()
        path = DEFAULT_PATH
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigInvalid(f"{path} cannot be read: {error}.", remedy="Give an existing file.") from error
    return parse(text, str(path))


def parse(text: str, where: str) -> Config:
    """The same from text; ``where`` names it in errors."""
    try:
        return msgspec.convert(tomllib.loads(text), Config)
    except tomllib.TOMLDecodeError as error:
        raise ConfigInvalid(f"{where} is not TOML: {error}.", remedy="Correct the line.", path=where) from error
    except msgspec.ValidationError as error:
        raise ConfigInvalid(
            f"{where}: {error}.", remedy="See deploy/server.toml for every key and its default.", path=where
        ) from error
