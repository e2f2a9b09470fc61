"""A taken-over machine that reboots comes back from its disk.

The live domain was started with our PE's kernel, and libvirt gives it that kernel again whenever the guest resets,
however its definition has changed since. So its live definition ends it on a reset (``on_reboot=destroy``), and here it
is started again, from the definition that boots the disk:

    QEMU shuts down because of a reset + definition boots the disk   ─► start
    any other end                        the guest powered itself off, or somebody destroyed it: left alone

libvirt's own events do not tell the two apart; QEMU's, which it passes on, do.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
from typing import Any

import libvirt
import libvirt_qemu

from standby.target.xml import boots_pe, machine_of

log = logging.getLogger(__name__)


class RebootWatcher:
    """Listens on every connection that it is attached to; starts domains from a thread of its own, because libvirt
    must not be called from inside its events."""

    def __init__(self) -> None:
        self._resets: set[str] = set()
        self._ended: queue.SimpleQueue[libvirt.virDomain | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._start_again, name="libvirt-reboots", daemon=True)
        self._thread.start()

    def attach(self, _uri: str, connection: libvirt.virConnect) -> None:
        """Register for the events of a new connection."""
        libvirt_qemu.qemuMonitorEventRegister(connection, None, "SHUTDOWN", self._on_shutdown, None)
        connection.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._on_lifecycle, None)

    def expect_end(self, domain_uuid: str) -> None:
        """The domain is being powered off on purpose: a reset before that does not count."""
        self._resets.discard(domain_uuid)

    def close(self) -> None:
        self._ended.put(None)
        self._thread.join()

    def _on_shutdown(
        self,
        _connection: libvirt.virConnect,
        domain: libvirt.virDomain,
        _event: str,
        _seconds: int,
        _micros: int,
        details: str | None,
        _opaque: Any,
    ) -> None:
        if str(json.loads(details or "{}").get("reason", "")).endswith("reset"):
            self._resets.add(domain.UUIDString())

    def _on_lifecycle(
        self, _connection: libvirt.virConnect, domain: libvirt.virDomain, event: int, detail: int, _opaque: Any
    ) -> None:
        log.debug("domain %s: event %d, detail %d", domain.name(), event, detail)
        if event == libvirt.VIR_DOMAIN_EVENT_STOPPED and domain.UUIDString() in self._resets:
            self._resets.discard(domain.UUIDString())
            self._ended.put(domain)

    def _start_again(self) -> None:
        while (domain := self._ended.get()) is not None:
            try:
                definition = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
                if machine_of(definition) is not None and not boots_pe(definition) and not domain.isActive():
                    log.info("%s has reset; starting it from its disk", domain.name())
                    domain.create()
            except libvirt.libvirtError as error:
                log.error("%s could not be started again: %s", domain.name(), error.get_error_message())
