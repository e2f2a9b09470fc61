"""The replicated system, kept ready to start: everything that can be done before a takeover is done before.

    at a recovery point    read  (replay waits)   mount read-only, find kernel, drivers and configuration, read them
      when /boot changed,  build (replay goes on)  initrd, unpack the kernel if that pays, load both for kexec
      and every minute
    takeover: inject       mount for writing (the journal is replayed); if what was read is not what is there now, read
                           and build again; write the configuration; unmount
    takeover: start        kexec

A read-only mount of a disk that was cut at a recovery point shows the file system without its journal: it may be old or
torn. That does no harm: what was read is compared with what is there after the journal's replay.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Protocol

from journal.errors import CdpError
from journal.extent import Extents
from journal.position import Position
from standby.pe import initrd, kexec, netconfig
from standby.pe.bootloader import BootEntry, default_entry, watched_files
from standby.pe.errors import InjectionFailed, SystemNotFound, SystemUnreadable
from standby.pe.filesystems import MODULES
from standby.pe.initrd import Nic, Root
from standby.pe.injection import InjectSpec, hosts, inject
from standby.pe.kernel import HEAD_BYTES, Kernel, quickest, release_of
from standby.pe.modules import CHECKSUMS, VIRTIO, ModuleTree
from standby.pe.system import MOUNT_POINT, MountedSystem, Placed, mounted
from standby.pe.watch import Stat, Watch, glance, stat_of, watch

CHECK_S: Final = 60.0
"""How often the boot files are looked at although no write to them was seen."""
RETRY_S: Final = 10.0
_ARGUMENTS: Final = (
    "fsck.mode=skip",
    # The new kernel announces its addresses as soon as they are up.
    "sysctl.net.ipv4.conf.all.arp_notify=1",
    "sysctl.net.ipv6.conf.all.ndisc_notify=1",
)


Signature = tuple[tuple[Stat, ...], Nic | None, str]
"""Files, network card and root: what is loaded depends on nothing else."""


class Loader(Protocol):
    """``standby.pe.kexec``."""

    def load(self, kernel: Kernel, initrd: bytes, command_line: str) -> None: ...

    def execute(self) -> None: ...


class Kexec:
    def load(self, kernel: Kernel, initrd: bytes, command_line: str) -> None:
        kexec.load(kernel, initrd, command_line)

    def execute(self) -> None:
        kexec.execute()


@dataclass(frozen=True, slots=True)
class BootFiles:
    """What was read from a mounted system, enough to build and load without the disks. ``signature`` names it;
    ``glanced``, the paths that it came from, and ``seen``, how they looked, tell cheaply that it still holds."""

    signature: Signature
    glanced: tuple[str, ...]
    seen: tuple[tuple[int, ...], ...]
    watch: Watch
    kernel_image: bytes
    make_initrd: Callable[[], bytes]
    command_line: str


class ReplicatedSystem:
    """``ports.Observer`` and ``verbs.Boot``. ``disks``: target disks by number; ``mac``: of the standby's card."""

    def __init__(
        self,
        disks: dict[int, Path],
        *,
        mac: str,
        server: str,
        service_addresses: Callable[[], Awaitable[Sequence[str]]],
        loader: Loader,
        mount_point: Path = MOUNT_POINT,
    ) -> None:
        self._numbers = sorted(disks)
        self._disks = [disks[number] for number in self._numbers]
        self._mac = mac
        self._server = server
        self._service_addresses = service_addresses
        self._loader = loader
        self._mount_point = mount_point
        self._lock = threading.Lock()
        """Held by whoever mounts or loads."""
        self._service_hosts: frozenset[str] = frozenset()
        self._loaded: BootFiles | None = None
        """Without its kernel image."""
        self._changed = True
        self._not_before_s = self._due_s = 0.0
        self._building: asyncio.Task[None] | None = None
        self.error: CdpError | None = None

    @property
    def ready(self) -> bool:
        """The replicated kernel is loaded, and nothing that was applied since has touched what it was read from."""
        return self._loaded is not None and not self._changed

    # --- ports.Observer ------------------------------------------------------------------------------------------
    def everything_changed(self) -> None:
        self._changed = True

    def applied(self, extents: Extents) -> None:
        if self._loaded is not None and self._loaded.watch.touched_by(extents):
            self._changed = True

    async def recovery_point(self, _position: Position, /) -> None:
        now_s = time.monotonic()
        building = self._building is not None and not self._building.done()
        if building or now_s < self._not_before_s or not (self._changed or now_s >= self._due_s):
            return
        self._not_before_s, self._due_s = now_s + RETRY_S, now_s + CHECK_S
        try:
            self._service_hosts = hosts(await self._service_addresses())
            files = await asyncio.to_thread(self._read)
        except CdpError as error:
            self.error, self._loaded = error, None
            return
        self._changed = False
        if files is None:
            self.error = None
        else:
            self._loaded = None
            self._building = asyncio.create_task(self._build_beside(files))

    # --- verbs.Boot -------------------------------------------------------------------------------------------------
    def inject(self, spec: InjectSpec, takeover: str) -> list[str]:
        began_s = time.monotonic()
        try:
            return self._inject(spec, takeover)
        finally:
            print(f"cdp-pe: injected within {time.monotonic() - began_s:.2f} s", flush=True)  # noqa: T201

    def _inject(self, spec: InjectSpec, takeover: str) -> list[str]:
        root = None if self._loaded is None else self._loaded.signature[2]
        with self._lock, mounted(self._disks, writable=True, at=self._mount_point, root_uuid=root) as system:
            self._service_hosts = hosts(spec.service_addresses)
            done = []
            files = self._look(system)
            if files is not None:
                self._build(files)
                done.append("kernel and drivers prepared again: they had changed since they were prepared")
            try:
                nic = self._nic(system)
                return done + inject(system, spec, takeover=takeover, server=self._server, nic=nic)
            except OSError as error:
                raise InjectionFailed(
                    f"The replicated system cannot be changed: {error}.",
                    remedy="Check free space and health of the root file system on the source.",
                    errno=error.errno,
                ) from error

    def start(self) -> None:
        with self._lock:
            self._loader.execute()

    def release(self) -> None:
        """Nothing is mounted beyond a call; what was injected makes the next seed's business."""
        with self._lock:
            self._changed = True

    # --- reading and building -----------------------------------------------------------------------------------------
    def _read(self) -> BootFiles | None:
        """None: what is loaded is still right."""
        with self._lock, mounted(self._disks, writable=False, at=self._mount_point) as system:
            return self._look(system)

    def _look(self, system: MountedSystem) -> BootFiles | None:
        try:
            nic, loaded = self._nic(system), self._loaded
            same_machine = loaded is not None and loaded.signature[1:] == (nic, system.filesystem.uuid)
            if loaded is not None and same_machine and loaded.seen == glance(system.root, loaded.glanced) != ():
                return None
            entry = default_entry(system)
            kernel = system.path(entry.kernel)
            with kernel.open("rb") as image:
                release = release_of(image.read(HEAD_BYTES))
            tree = ModuleTree(system.path(f"lib/modules/{release}"))
            paths = tree.in_order((*MODULES[system.filesystem.kind], *VIRTIO), optional=CHECKSUMS)
            read = [kernel, *(tree.directory / path for path in paths)]
            if entry.initrd is not None and not system.plain:
                read.append(system.path(entry.initrd))
            read += watched_files(system, entry)
            signature = (stat_of(system.root, read), nic, system.filesystem.uuid)
            if loaded is not None and signature == loaded.signature:
                return None
            glanced = tuple(str(path.relative_to(system.root)) for path in read)
            return BootFiles(
                signature=signature,
                glanced=glanced,
                seen=glance(system.root, glanced),
                watch=watch(self._placed(system, entry), self._numbers),
                kernel_image=kernel.read_bytes(),
                make_initrd=self._initrd_maker(system, entry, tree, paths, nic),
                command_line=_command_line(system, entry),
            )
        except OSError as error:
            raise SystemUnreadable(
                f"The replicated system's boot files cannot be read: {error}.",
                remedy="It is tried again at another recovery point.",
                errno=error.errno,
            ) from error

    def _initrd_maker(
        self, system: MountedSystem, entry: BootEntry, tree: ModuleTree, paths: list[str], nic: Nic | None
    ) -> Callable[[], bytes]:
        """Reads now what it needs from the disks, so that it can be called without them."""
        if system.plain:
            modules = [(f"{Path(path).name.split('.ko')[0]}.ko", tree.read(path)) for path in paths]
            root = Root(system.filesystem.uuid, system.filesystem.kind)
            return lambda: initrd.mini(modules, root, nic)
        if entry.initrd is None:
            raise SystemNotFound(
                "The replicated system has no initrd, but its root file system needs one.",
                remedy="Build an initramfs on the source.",
            )
        # Small beside the initrd itself, and it needs the tree.
        whole = initrd.appended(system.path(entry.initrd).read_bytes(), tree, paths)
        return lambda: whole

    def _placed(self, system: MountedSystem, entry: BootEntry) -> Iterator[tuple[Path, Placed]]:
        boot = system.path("boot")
        for path in watched_files(system, entry):
            on_boot = system.boot_placed is not None and (path == boot or boot in path.parents)
            yield path, system.boot_placed if on_boot and system.boot_placed else system.placed

    def _nic(self, system: MountedSystem) -> Nic | None:
        name = netconfig.card_name(system.root, self._service_hosts)
        return None if name is None else Nic(self._mac, name)

    async def _build_beside(self, files: BootFiles) -> None:
        try:
            await asyncio.to_thread(self._build_locked, files)
        except CdpError as error:
            self.error, self._changed = error, True

    def _build_locked(self, files: BootFiles) -> None:
        with self._lock:
            self._build(files)

    def _build(self, files: BootFiles) -> None:
        self._loaded = None
        self._loader.load(quickest(files.kernel_image), files.make_initrd(), files.command_line)
        # What was loaded lies in the kernel now; here it would only take the room of the next one.
        self._loaded = replace(files, kernel_image=b"", make_initrd=bytes)
        self.error = None


def _command_line(system: MountedSystem, entry: BootEntry) -> str:
    """The source's own arguments, without what its boot loader added, and ours."""
    words = [word for word in entry.arguments.split() if not word.startswith(("BOOT_IMAGE=", "initrd="))]
    if system.plain:
        # The mini initrd mounts it writable; a device name of the old platform would lead nowhere.
        words = [word for word in words if word not in ("ro", "rw") and not word.startswith("root=")]
        words = [f"root=UUID={system.filesystem.uuid}", "rw", *words]
    names = {word.partition("=")[0] for word in words}
    return " ".join([*words, *(word for word in _ARGUMENTS if word.partition("=")[0] not in names)])
