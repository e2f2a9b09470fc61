"""The PE in a virtual machine under QEMU's user network, without libvirt: the shortest way to a real kexec."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from journal.segment import Flags
from standby.pe.image import PeImage
from standby.pe.image.cpio import CpioWriter
from tests.harness.process import Program, run
from tests.server.running import Writer

SERVER = "10.0.2.2"
"""The host's loopback, as QEMU's user network shows it to the guest."""
MANAGEMENT = "10.0.2.20/24"
SOURCE_MANAGEMENT = "10.0.2.10/24"
SERVICE = "10.0.2.100"
MAC = "52:54:00:12:34:56"
INTERFACE = "ens7"
"""A name that no card gets by itself here: only the injection can have given it."""
_PARTITION = 1 << 20
_PIECE = 32 << 20
_BLOCK = 64 << 10
_CPU = "qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt,+rdrand"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def source_disk(base: Path, disk: Path) -> None:
    """A copy of the source image whose network is that of ``SERVICE`` and whose PostgreSQL lets everybody in."""
    run(["cp", "--sparse=always", str(base), str(disk)])
    script = f"""
set -eu
mkdir -p "$2"
mount -o loop,offset={_PARTITION} "$1" "$2"
cd "$2"
mkdir -p etc/network/interfaces.d
echo 'source /etc/network/interfaces.d/*' >etc/network/interfaces
cat >etc/network/interfaces.d/all <<END
auto lo
iface lo inet loopback
auto {INTERFACE}
iface {INTERFACE} inet static
    address {SOURCE_MANAGEMENT}
iface {INTERFACE} inet static
    address {SERVICE}/24
END
echo "listen_addresses = '*'" >etc/postgresql/15/main/conf.d/test.conf
echo 'host all all 0.0.0.0/0 trust' >>etc/postgresql/15/main/pg_hba.conf
cd /
umount "$2"
"""
    # A mount namespace of its own: the mount is seen by nobody else, and gone whatever happens.
    mount_point = disk.with_suffix(".mnt")
    subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", str(disk), str(mount_point)],
        check=True,
    )


def segments_of(disk: Path, writer: Writer) -> Iterator[bytearray]:
    """The whole disk as the segments of a seed; the last one is a recovery point."""
    with disk.open("rb") as file:
        size = disk.stat().st_size
        for start in range(0, size, _PIECE):
            piece = np.frombuffer(file.read(_PIECE), np.uint8)
            blocks = piece.reshape(-1, _BLOCK)
            used = np.flatnonzero(blocks.any(axis=1)).tolist()
            if used:
                yield writer.seal(
                    [(0, start + number * _BLOCK, blocks[number].tobytes()) for number in used], Flags.FUZZY
                )
    yield writer.seal()


def killable(initrd: Path, into: Path) -> Path:
    """The image with another init in front of it, ``/killable``: each line at the second serial port is a SIGKILL of
    the agent. Everything else is as in the image's own."""
    init = files("standby.pe.image").joinpath("init.sh").read_text()
    before, loop, after = init.rpartition("while :; do\n")
    assert loop
    killer = "while read -r _; do kill -9 $(pidof python3); done </dev/ttyS1 &\n"
    with into.open("wb") as out:
        with CpioWriter(out) as cpio:
            cpio.file("killable", (before + killer + loop + after).encode(), 0o755)
        with initrd.open("rb") as image:
            shutil.copyfileobj(image, out)
    return into


class PeVm:
    """One machine that boots the PE, killable. ``port``: of the host, forwarded to PostgreSQL at ``SERVICE``."""

    def __init__(self, image: PeImage, disk: Path, config: Path, directory: Path) -> None:
        self.port = free_port()
        self.console = directory / "console.log"
        self._killer = directory / "killer"
        network = f"user,id=net,hostfwd=tcp:127.0.0.1:{self.port}-{SERVICE}:5432"
        self._program = Program(
            "qemu",
            [
                "qemu-system-x86_64",
                *("-machine", "q35", "-accel", "tcg", "-cpu", _CPU, "-smp", "2", "-m", "1024"),
                *("-display", "none", "-no-reboot", "-monitor", "none"),
                *("-serial", f"file:{self.console}"),
                *("-serial", f"unix:{self._killer},server=on,wait=off"),
                *("-kernel", str(image.kernel), "-initrd", str(killable(image.initrd, directory / "initrd"))),
                *("-append", f"{image.arguments} rdinit=/killable"),
                *("-drive", f"file={disk},if=none,id=disk,format=raw,cache=writeback,discard=unmap"),
                *("-device", "virtio-blk-pci,drive=disk,serial=cdp-disk-0"),
                *("-drive", f"file={config},if=none,id=config,format=raw,readonly=on"),
                *("-device", "virtio-blk-pci,drive=config,serial=cdp-config"),
                *("-netdev", network, "-device", f"virtio-net-pci,netdev=net,mac={MAC}"),
                *("-device", "virtio-rng-pci"),
            ],
            directory,
        )

    def __enter__(self) -> Self:
        self._program.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._program.kill_for_good()

    def said(self) -> str:
        return self.console.read_text(errors="replace") if self.console.exists() else ""

    def kill_agent(self) -> None:
        """SIGKILL of ``cdp-pe`` inside the PE; init starts it again."""
        with socket.socket(socket.AF_UNIX) as killer:
            killer.connect(str(self._killer))
            killer.sendall(b"\n")

    def kills(self) -> int:
        return self.said().count("ended with status 137")

    def answer(self, statement: str) -> str | None:
        """PostgreSQL's answer; None if there is none within a second."""
        command = ["psql", "-h", "127.0.0.1", "-p", str(self.port), "-U", "postgres", "-Atqc", statement]
        environment = os.environ | {"PGCONNECT_TIMEOUT": "2"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=30)
        return done.stdout.strip() if done.returncode == 0 else None
