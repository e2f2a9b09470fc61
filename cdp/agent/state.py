"""What the agent remembers.

Durable, in the state directory (it may lie on a protected disk: it is written when something changes for good, never in
a rhythm): the identity, the fence, the service addresses.

Volatile, in the runtime directory (tmpfs, or a directory on an unprotected disk): the spool and the ``Cursor``. It must
survive the death of any process, not that of the machine; a cursor of another boot is void, and so is one of
another capture.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from cdp.agent.dirty import Geometry, Round
from cdp.agent.errors import NotJoined
from journal.position import Position

Mode = Literal["postgresql", "freeze", "hooks", "none"]
"""How the machine's services are quiesced; ``quiesce.py``."""
_StructT = TypeVar("_StructT", bound=msgspec.Struct)


class Identity(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Who this machine is to the server. ``machine`` is a UUID. The file is readable by root only."""

    machine: str
    name: str
    server: str
    credential: str
    secret: str

    @property
    def machine_id(self) -> uuid.UUID:
        return uuid.UUID(self.machine)


class Fence(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """This machine may not serve. ``generation`` is the live one that it is not part of; ``tip`` what it had sealed.

    ``removed``, ``devices`` and ``routes`` are the evidence of the address removal, kept to undo it. ``quiesced`` says
    that the services were stopped by us and are to be started when the fence is lifted. ``sealing``: the addresses are
    off, but what was written until then is not sealed yet.
    """

    generation: int
    addresses: list[str] = []
    tip: str | None = None
    removed: list[str] = []
    devices: dict[str, str] = {}
    routes: list[dict[str, Any]] = []
    quiesced: Mode | None = None
    sealing: bool = False


class Addresses(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The service addresses, as the server last told them: what to give up when this side is superseded."""

    addresses: list[str] = []


class Cursor(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Where the pipeline stands: one file, replaced in one step after the segments it speaks of are written.

    ``tip``        the last sealed position
    ``raw``        everything below this position of the raw spool is sealed (or was dropped and marked)
    ``resume``     but the raw spool is needed from here on, for the ``open_bios``
    ``open_bios``  bio -> cut before which its first record lies: writes not yet recorded whole at the last cut
    ``dealt``      losses up to this drop generation have been copied
    ``dirty``      packed marks for the next round
    """

    machine: str
    boot_id: str
    capture: str
    disks: list[Geometry]
    tip: str
    sealed_at_ns: int
    raw: int
    resume: int
    open_bios: dict[int, int] = {}
    dealt: int = 0
    dirty: dict[int, bytes] = {}
    round: Round | None = None

    @property
    def position(self) -> Position:
        return Position.parse(self.tip)


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def write_file(path: Path, content: bytes, *, mode: int = 0o600, durable: bool) -> None:
    """Replace ``path`` in one step. ``durable``: also against a power cut."""
    temporary = path.with_name(path.name + ".tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        os.write(fd, content)
        if durable:
            os.fsync(fd)
    finally:
        os.close(fd)
    temporary.replace(path)
    if durable:
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


class StateDir:
    """The durable side. Missing files read as None."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ca_file = directory / "ca.pem"

    def create(self) -> None:
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def identity(self) -> Identity:
        found = self._load("identity.json", Identity)
        if found is None:
            raise NotJoined(
                f"This machine is not enrolled: {self.directory / 'identity.json'} does not exist.",
                remedy="On the server run 'cdp machines add NAME', then here 'cdp join URL TOKEN'.",
            )
        return found

    def save_identity(self, identity: Identity) -> None:
        self._save("identity.json", identity)

    def fence(self) -> Fence | None:
        return self._load("fence.json", Fence)

    def save_fence(self, fence: Fence | None) -> None:
        if fence is not None:
            self._save("fence.json", fence)
        else:
            (self.directory / "fence.json").unlink(missing_ok=True)

    def addresses(self) -> list[str]:
        found = self._load("addresses.json", Addresses)
        return [] if found is None else found.addresses

    def save_addresses(self, addresses: list[str]) -> None:
        if addresses != self.addresses():
            self._save("addresses.json", Addresses(addresses=addresses))

    def _load(self, name: str, kind: type[_StructT]) -> _StructT | None:
        try:
            return msgspec.json.decode((self.directory / name).read_bytes(), type=kind)
        except FileNotFoundError:
            return None

    def _save(self, name: str, value: msgspec.Struct) -> None:
        write_file(self.directory / name, msgspec.json.encode(value), durable=True)


def load_cursor(path: Path) -> Cursor | None:
    """None if there is none, or none that this version understands: the history is then compared by hash."""
    try:
        return msgspec.msgpack.decode(path.read_bytes(), type=Cursor)
    except (FileNotFoundError, msgspec.ValidationError, msgspec.DecodeError):
        return None


def save_cursor(path: Path, cursor: Cursor) -> None:
    write_file(path, msgspec.msgpack.encode(cursor), durable=False)
