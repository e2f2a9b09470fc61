"""A held image, and nbdkit in front of it.

cdp ── PUT export (renewed) ──► server           holds the recovery point
 └──► nbdkit ── nbdkit_plugin.py ── GET ──► server
         ▲ NBD, read-only: qemu-img, nbdcopy, guestfish, a virtual machine
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote

from cdp.cli.client import Client, find_credential, name_in
from cdp.cli.errors import ExportFailed
from cdp.cli.point import short_name
from cdp.server import export_messages as x
from cdp.server import messages as m
from journal import wire
from journal.errors import CdpError

PLUGIN: Final = Path(__file__).with_name("nbdkit_plugin.py")
READY_S: Final = 30.0
END_S: Final = 10.0
RENEW_S: Final = x.LEASE_S / 4
_POLL_S: Final = 0.02


class Held:
    """An export of the server: the recovery point stays for as long as ``renew`` is called or somebody reads."""

    def __init__(self, client: Client, point: m.PointAnswer, id_: str | None = None) -> None:
        self.client = client
        self.point = point
        self.id = id_ or uuid.uuid4().hex[:16]
        self.path = name_in(x.EXPORT, point.machine, self.id)
        self.renew()

    def renew(self) -> None:
        self.client.send("PUT", self.path, x.ExportRequest(position=self.point.position), x.Export)

    def end(self) -> None:
        """Best effort: what is left runs out by itself."""
        with contextlib.suppress(CdpError):
            self.client.raw("DELETE", self.path)


@contextmanager
def hold(client: Client, point: m.PointAnswer) -> Iterator[Held]:
    """Renewed in the background, whether anybody reads or not, until the block ends."""
    held = Held(client, point)
    done = threading.Event()
    renewing = Held(client.another(), point, held.id)

    def renew() -> None:
        while not done.wait(RENEW_S):
            # A server that is away is waited for, as the readers do.
            with contextlib.suppress(CdpError):
                renewing.renew()

    thread = threading.Thread(target=renew, name="renew", daemon=True)
    thread.start()
    try:
        yield held
    finally:
        done.set()
        thread.join()
        renewing.client.close()
        held.end()


@dataclass(frozen=True, slots=True)
class Listen:
    """``path`` of a Unix socket, or ``host`` and ``port``."""

    path: Path | None
    host: str = ""
    port: int = 0

    def uri(self, name: str) -> str:
        if self.path is not None:
            return f"nbd+unix:///{quote(name)}?socket={quote(str(self.path))}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"nbd://{host}:{self.port}/{quote(name)}"

    @property
    def arguments(self) -> list[str]:
        if self.path is not None:
            return ["--unix", str(self.path)]
        return ["--ipaddr", self.host, "--port", str(self.port)]


class Nbdkit:
    """nbdkit with our plugin. Dies with this process, whatever ends it."""

    def __init__(
        self, held: Held, listen: Listen, disks: list[wire.DiskInfo], *, writable_in: Path | None = None
    ) -> None:
        """``disks``: the first one is what a client gets that names none. ``writable_in``: a directory for what a
        client writes (copy on write, thrown away at the end); None: read-only. Raises ``ExportFailed``."""
        self.listen = listen
        self._directory = Path(tempfile.mkdtemp(prefix="cdp-nbd-"))
        self._log = self._directory / "log"
        try:
            self._start(held, disks, writable_in)
            self._wait_ready()
        except BaseException:
            self.close()
            raise

    def _start(self, held: Held, disks: list[wire.DiskInfo], writable_in: Path | None) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        credential, operator = find_credential()
        names = {
            short_name(disk): {
                "index": disk.index,
                "size_bytes": disk.size_bytes,
                "about": f"{held.point.name} {disk.name}",
            }
            for disk in disks
        }
        filters = [] if writable_in is None else ["--filter=cow"]
        words = [
            *("nbdkit", "--foreground", "--exit-with-parent", "--threads", "16"),
            *([] if filters else ["--readonly"]),
            *filters,
            *("--pidfile", str(self._directory / "pid"), *self.listen.arguments),
            *("python", str(PLUGIN), f"credential={credential}", f"server={operator.server}"),
            *(f"path={held.path}", f"disks={json.dumps(names)}", f"default={short_name(disks[0])}"),
        ]
        # The plugin brings nothing along: what this process imports from must not get in its way.
        env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        if writable_in is not None:
            env["TMPDIR"] = str(writable_in)
        try:
            with self._log.open("wb") as log:
                # In a group of its own: Ctrl-C is ours to handle, and the clients' last reads are answered.
                self._process = subprocess.Popen(words, stdout=log, stderr=log, env=env, process_group=0)
        except FileNotFoundError:
            raise ExportFailed(
                "Images are exported by nbdkit, which is not installed.",
                remedy="Install the packages nbdkit and nbdkit-plugin-python.",
            ) from None

    def _wait_ready(self) -> None:
        assert self._process is not None
        until_s = time.monotonic() + READY_S
        # nbdkit writes its pid file when it accepts connections.
        while not (self._directory / "pid").exists():
            if self._process.poll() is not None or time.monotonic() > until_s:
                raise self.failed()
            time.sleep(_POLL_S)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def wait(self) -> None:
        """Until it ends, which it does not by itself."""
        assert self._process is not None
        self._process.wait()

    def failed(self) -> ExportFailed:
        """With what it said before it ended."""
        said = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        last = said[-1] if said else "it said nothing"
        return ExportFailed(
            f"nbdkit has failed: {last}.",
            remedy="Is nbdkit-plugin-python installed, and is the address to listen at free?",
            log="\n".join(said[-20:]),
        )

    def close(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(END_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self.listen.path is not None:
            self.listen.path.unlink(missing_ok=True)
        shutil.rmtree(self._directory, ignore_errors=True)


@contextmanager
def nbd(held: Held, listen: Listen, disks: list[wire.DiskInfo], *, writable_in: Path | None = None) -> Iterator[Nbdkit]:
    server = Nbdkit(held, listen, disks, writable_in=writable_in)
    try:
        yield server
    finally:
        server.close()
