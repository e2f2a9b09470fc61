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
from typing import Any

import libvirt

from deploy.lab import hypervisor, layout, network, server, source_image, source_vm, wheels
from deploy.lab.errors import LabFailed, LabNotReady
from deploy.lab.layout import Layout, default_layout
from deploy.lab.programs import Processes, wait_until
from standby.pe import image as pe_image

Progress = Callable[[str], None]


AGENT_DEADLINE_S = 120.0
READY_DEADLINE_S = 900.0
"""A seed of a gigabyte, compressed by an emulated CPU that shares two cores with everything else."""
STATUS_INTERVAL_S = 3.0
"""Each look is a start of Python on cores that an emulated machine wants."""


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
        shutil.unpack_archive(wheel, self.where.code, "zip")
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

    def protect(self) -> None:
        """Do what a user does: enrol the source, start its agent, protect it with a standby; wait until it is ready."""
        where = self.where
        self._say("joining the source")
        issued = server.cdp_json(where, "machines", "add", layout.MACHINE)
        source_vm.ssh(where, f"cdp join {issued['url']} {issued['token']} && systemctl enable --now cdp-agent")
        wait_until(lambda: self._machine()["agent"]["connected"], AGENT_DEADLINE_S, "the agent's report")
        self._say("protecting it")
        arguments = ["--bridge", layout.BRIDGE, "--standby-address", layout.STANDBY_ADDRESS]
        for address in layout.SERVICE_ADDRESSES:
            arguments += ["--service-address", address]
        server.cdp(
            where,
            *("protect", layout.MACHINE, "--hypervisor", where.hypervisor_uri, *arguments),
            *("--storage-dir", str(where.standby_dir), "--memory", "1G", "--quiesce", "postgresql"),
            *("--probe", f"postgresql:{layout.DATABASE_PORT}"),
            deadline_s=120,
        )
        self.wait_ready()

    def wait_ready(self) -> None:
        """Return once the standby could take over."""
        end = time.monotonic() + READY_DEADLINE_S
        told = ""
        while (status := self._machine())["standby_state"] != "ready":
            text = _summary(status)
            if text != told:
                self._say(text)
                told = text
            if time.monotonic() > end:
                raise LabNotReady(
                    f"The standby was not ready within {READY_DEADLINE_S:.0f} s; last seen: {text}",
                    remedy="'cdp-lab cdp status source' says more.",
                    status=status,
                )
            time.sleep(STATUS_INTERVAL_S)
        self._say("the standby is ready")

    def _machine(self) -> dict[str, Any]:
        status = server.cdp_json(self.where, "status", layout.MACHINE)
        assert isinstance(status, dict)
        return status

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


def _summary(status: dict[str, Any]) -> str:
    """One line of what is going on."""
    parts = [f"agent {status['agent']['state'] or 'away'}", f"standby {status['standby_state'] or '-'}"]
    for peer in (status["agent"], status["standby"] or {}):
        progress = peer.get("progress")
        if progress and progress["total_bytes"]:
            share = 100 * progress["done_bytes"] // progress["total_bytes"]
            parts.append(f"{progress['what']} {share // 10 * 10} %")
    return ", ".join([*parts, *status["problems"][:1]])
