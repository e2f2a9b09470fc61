"""Put the lab together, take it apart.

up:    images ─► network ─► libvirtd ─► server ─► source VM ─► boot
join:  machine and token at the server ─► `cdp join` on the source ─► agent ─► protection ─► standby
down:  domains, processes, namespaces, files; works on the remains of anything
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import libvirt

from deploy.lab import hypervisor, network, server, source_image, source_vm, wheels
from deploy.lab.errors import LabFailed
from deploy.lab.layout import Layout, default_layout
from deploy.lab.programs import Processes
from standby.pe import image as pe_image

Progress = Callable[[str], None]


class Lab:
    """``keep_logs`` is where ``down`` leaves the logs of a lab that is gone; None: nowhere."""

    def __init__(self, where: Layout | None = None, progress: Progress = print, keep_logs: Path | None = None) -> None:
        self.where = where or default_layout()
        self.processes = Processes(self.where.root / "processes.json", self.where.logs)
        self._progress = progress
        self._keep_logs = keep_logs
        self._started = time.monotonic()

    def up(self) -> None:
        """Bring up everything but the protection. A failure takes it all down again."""
        if self.where.root.exists():
            raise LabFailed(
                f"There is a lab in {self.where.root} already.",
                remedy="'cdp-lab down' ends it; CDP_LAB_NAME gives another one another name.",
            )
        self.where.logs.mkdir(parents=True)
        try:
            self._up()
        except BaseException:
            self.down()
            raise

    def _up(self) -> None:
        self._say("images")
        base = source_image.base_disk(wheels.wheelhouse(self._say), self._say)
        image = pe_image.build(progress=self._say)
        pe_image.install(image, self.where.server_dir / "pe")
        wheel = wheels.own_wheel(self.where.root / "wheel")
        self._say("the source machine's disk")
        source_vm.prepare(self.where, base, wheel)
        self._say("network")
        network.up(self.where)
        self._say("source machine")
        source_vm.start(self.where, self.processes)
        self._say("hypervisor")
        hypervisor.start(self.where, self.processes)
        self._say("server")
        server.start(self.where, self.processes)
        self._say("waiting for the source machine's boot")
        source_vm.wait_booted(self.where, self.processes)
        self._say("up")

    def down(self) -> None:
        """End and delete everything of this lab, whatever state it is in."""
        self._destroy_domains()
        self.processes.stop_all()
        network.down(self.where)
        if self._keep_logs is not None and self.where.logs.exists():
            self._keep_logs.mkdir(parents=True, exist_ok=True)
            shutil.copytree(self.where.logs, self._keep_logs, dirs_exist_ok=True)
            if self.where.standby_console.exists():
                shutil.copy(self.where.standby_console, self._keep_logs / "standby-console.log")
        shutil.rmtree(self.where.root, ignore_errors=True)

    def status(self) -> dict[str, str]:
        """What runs: name -> "running" or "gone"."""
        return {process.name: "running" if process.alive else "gone" for process in self.processes.all()}

    def _destroy_domains(self) -> None:
        if not self.where.libvirt_socket.exists():
            return
        try:
            connection = libvirt.open(self.where.hypervisor_uri)
            for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
                domain.destroy()
            connection.close()
        except libvirt.libvirtError as error:
            # libvirtd is gone or broken; what it started ends with its reaper or with the namespace.
            self._say(f"libvirtd does not answer any more: {error}")

    def _say(self, text: str) -> None:
        self._progress(f"[{time.monotonic() - self._started:6.1f} s] {text}")

    say = _say
