"""The agent's configuration, ``/etc/cdp/agent.toml``. Every default is here, with its reason; unknown keys are errors.

server = "https://backup.example:7443"
disks = ["/dev/vda"]

[quiesce]
postgresql_unit = "postgresql"
"""

from __future__ import annotations

import tomllib
from pathlib import Path

import msgspec

from cdp.agent.capture.layout import RING_BYTES
from cdp.agent.errors import ConfigInvalid

DEFAULT_PATH = Path("/etc/cdp/agent.toml")


SPOOL_BYTES_MIN = 32 << 20


class _Section(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    pass


class CaptureConfig(_Section):
    ring_bytes: int = RING_BYTES
    """Kernel memory between the block layer and the drainer, which maps all of it. 16 MiB lost some events in minutes
    of pgbench, to a checkpoint's burst at the speed of memory; 64 MiB for machines with long bursts."""
    raw_spool_bytes: int | None = None
    """Between drainer and pipeline: what a burst may be ahead of compression. Lies in the runtime directory and
    takes memory only while a burst lasts. Default: 512 MiB, but at most a sixteenth of the memory."""
    pin_dir: Path = Path("/sys/fs/bpf/cdp")
    """Where programs and maps are pinned, so that capture outlives the agent's processes."""


class SpoolConfig(_Section):
    directory: Path | None = None
    """Sealed segments that the server has not got. Default: ``spool`` in the runtime directory. Never on a protected
    disk."""
    bytes: int | None = None
    """Bounds it. When it is full the agent goes on capturing but drops, and resyncs the dropped ranges later. Default:
    256 MiB, but at most an eighth of the memory."""


class CopyConfig(_Section):
    mb_per_s_max: float = 200.0
    """Reading of a seed or resync, in MB/s: the source's own work comes first. 0: no limit."""
    dedup: bool = True
    """Before a first seed, read the disks once more to ask which of their chunks the server has already, and leave
    those out. False: where the line is faster than the disks."""


class QuiesceConfig(_Section):
    """What a planned takeover does to the services of *this* machine; see ``quiesce.py``. The server names a mode,
    never a command."""

    postgresql_unit: str = "postgresql"
    """systemd unit that is stopped after a checkpoint."""
    postgresql_checkpoint: list[str] = msgspec.field(
        default_factory=lambda: ["runuser", "-u", "postgres", "--", "psql", "-X", "-q", "-c", "CHECKPOINT"]
    )
    """Run before the unit is stopped, so that stopping has little left to write. Empty: skip it."""
    freeze: list[Path] = msgspec.field(default_factory=lambda: [Path("/")])
    """Mount points that mode ``freeze`` freezes, in this order."""
    before: list[str] = []
    """Mode ``hooks``: the command that quiesces, as a list; its exit code 0 means done."""
    after: list[str] = []
    """Mode ``hooks``: the command that undoes it."""


class BookmarkConfig(_Section):
    """How *this* machine is held still for an application-consistent bookmark; see ``guardian.py``. The server asks for
    it, and names no command."""

    hooks: list[str] = []
    """Run in this order. "postgresql" and "mariadb" are shipped; a file of that name in ``hook_dir`` goes first."""
    hook_dir: Path = Path("/etc/cdp/hooks")
    environment: dict[str, str] = {}
    """For the hooks: where the database listens, which account to use; each hook says at its top what it reads."""
    freeze: list[Path] | None = None
    """Mount points to freeze after the hooks. Default: all writable file systems of the protected disks."""
    prepare_s: float = 60.0
    """For the hooks to get ready (checkpoints), while everybody works; and for writing back what is in the cache."""
    freeze_s: float = 10.0
    """How long anybody may be kept waiting, from the first hook's freeze to the thaw. One tenth of it is usual."""


class MetricsConfig(_Section):
    host: str = "127.0.0.1"
    """The metrics page asks for no credential: keep it on loopback."""
    port: int = 9109
    """0 switches it off."""


class AgentConfig(_Section):
    server: str
    """Base URL of the server."""
    disks: list[Path]
    """Whole disks; all of them are one consistency group."""
    state_dir: Path = Path("/var/lib/cdp")
    """Identity, credential, fence. May lie on a protected disk."""
    runtime_dir: Path = Path("/run/cdp")
    """Raw spool, spool, cursor. Survives the agent, not the machine."""
    mount_tmpfs: bool = True
    """Mount a tmpfs of fitting size on the runtime directory: /run itself is a tenth of the memory on many systems."""
    segment_s: float = 1.0
    """Length of a segment: the distance of recovery points."""
    capture: CaptureConfig = msgspec.field(default_factory=CaptureConfig)
    spool: SpoolConfig = msgspec.field(default_factory=SpoolConfig)
    copy: CopyConfig = msgspec.field(default_factory=CopyConfig)
    quiesce: QuiesceConfig = msgspec.field(default_factory=QuiesceConfig)
    bookmark: BookmarkConfig = msgspec.field(default_factory=BookmarkConfig)
    metrics: MetricsConfig = msgspec.field(default_factory=MetricsConfig)

    def __post_init__(self) -> None:
        for name, wrong, rule in (
            ("server", not self.server.startswith(("https://", "http://")), "must be an https:// URL"),
            ("disks", not self.disks, "must name at least one disk"),
            ("disks", len(set(self.disks)) != len(self.disks), "names a disk twice"),
            ("segment_s", not 0.1 <= self.segment_s <= 60, "must be between 0.1 and 60"),
            ("spool.bytes", _below(self.spool.bytes), "must be at least 32 MiB: a segment may have 21"),
            ("capture.raw_spool_bytes", _below(self.capture.raw_spool_bytes), "must be at least 32 MiB"),
            ("copy.mb_per_s_max", self.copy.mb_per_s_max < 0, "must not be negative"),
            ("bookmark.hooks", _odd_names(self.bookmark.hooks), "must be file names, each once"),
            ("bookmark.prepare_s", not 1 <= self.bookmark.prepare_s <= 3600, "must be between 1 and 3600"),
            ("bookmark.freeze_s", not 0.5 <= self.bookmark.freeze_s <= 60, "must be between 0.5 and 60"),
            ("metrics.port", not 0 <= self.metrics.port <= 65535, "is not a port"),
        ):
            if wrong:
                raise ValueError(f"{name} {rule}")

    @property
    def raw_spool_dir(self) -> Path:
        return self.runtime_dir / "raw"

    @property
    def spool_dir(self) -> Path:
        return self.spool.directory or self.runtime_dir / "spool"


def _below(value: int | None) -> bool:
    return value is not None and value < SPOOL_BYTES_MIN


def _odd_names(names: list[str]) -> bool:
    return len(set(names)) != len(names) or any(not name or name.startswith(".") or "/" in name for name in names)


def load(path: Path = DEFAULT_PATH) -> AgentConfig:
    """Raises ``ConfigInvalid`` with the key's name."""
    try:
        return parse(path.read_text(), str(path))
    except FileNotFoundError:
        raise ConfigInvalid(
            f"There is no configuration at {path}.", remedy="'cdp join URL TOKEN' writes one.", path=str(path)
        ) from None


def parse(text: str, source: str = "agent.toml") -> AgentConfig:
    try:
        return msgspec.convert(tomllib.loads(text), AgentConfig, dec_hook=_path)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise ConfigInvalid(
            f"{source}: {error}.", remedy="The keys and their defaults are documented in cdp/agent/config.py."
        ) from error


def _path(kind: type, value: object) -> object:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise ValueError(f"not a {kind.__name__}")


def template(server: str, disks: list[Path]) -> str:
    """The file that ``cdp join`` writes: what it knows, and the defaults as comments."""
    listed = ", ".join(f'"{disk}"' for disk in disks)
    return f"""\
# Configuration of the CDP agent. Commented lines are the defaults.

server = "{server}"
# Whole disks, not partitions. All of them are one consistency group.
disks = [{listed}]

# state_dir = "/var/lib/cdp"
# runtime_dir = "/run/cdp"
# mount_tmpfs = true             # a tmpfs of its own on runtime_dir
# segment_s = 1.0                # the distance of recovery points

[capture]
# ring_bytes = 33554432          # kernel memory; 67108864 for machines with long bursts
# raw_spool_bytes = 536870912    # taken only in a burst; default: at most a sixteenth of the memory
# pin_dir = "/sys/fs/bpf/cdp"

[spool]
# directory = "/run/cdp/spool"   # or a directory on a disk that is not protected
# bytes = 268435456              # how far the server may be behind; default: at most an eighth of the memory

[copy]
# mb_per_s_max = 200             # of a seed or resync; 0: no limit
# dedup = true                   # ask first what the server has already

[quiesce]
# postgresql_unit = "postgresql"
# postgresql_checkpoint = ["runuser", "-u", "postgres", "--", "psql", "-X", "-q", "-c", "CHECKPOINT"]
# freeze = ["/"]
# before = []                    # mode "hooks": the command that quiesces …
# after = []                     # … and the one that undoes it

[bookmark]
# hooks = []                     # of application-consistent bookmarks: "postgresql", "mariadb", or yours in hook_dir
# hook_dir = "/etc/cdp/hooks"
# environment = {{}}               # for the hooks, such as {{ PGPORT = "5433" }}
# freeze = ["/", "/srv"]         # default: every writable file system of the protected disks
# prepare_s = 60
# freeze_s = 10                  # nobody waits for longer than this

[metrics]
# host = "127.0.0.1"
# port = 9109                    # 0: off
"""
