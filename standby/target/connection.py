"""Connections to libvirt: opened when needed, opened again when they broke, errors turned into ours.

libvirt delivers events only if the process runs its event loop; one thread does, for all connections, from the first
connection on. It is a daemon thread: libvirt has no way to end it, and it holds nothing that has to be saved.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import libvirt

from journal.errors import CdpError
from standby.target.errors import HypervisorRefused, HypervisorUnreachable

Parameters = ParamSpec("Parameters")
Answer = TypeVar("Answer")

KEEPALIVE_INTERVAL_S = 5
KEEPALIVE_COUNT = 3
"""A hypervisor that is silent for their product breaks the connection instead of blocking the caller for ever."""


def translated(function: Callable[Parameters, Answer]) -> Callable[Parameters, Answer]:
    """Let no ``libvirtError`` out: it becomes ``HypervisorRefused`` with libvirt's own words."""

    @functools.wraps(function)
    def wrapper(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Answer:
        try:
            return function(*args, **kwargs)
        except libvirt.libvirtError as error:
            raise refusal(error) from error

    return wrapper


def refusal(error: libvirt.libvirtError) -> CdpError:
    """The typed form of what libvirt said."""
    return HypervisorRefused(
        f"The hypervisor refused: {error.get_error_message()}.",
        remedy="Its log (journalctl -u libvirtd) says more.",
        libvirt_code=error.get_error_code(),
    )


class Connections:
    """One connection per URI. ``on_open`` is called with each new one, to register for its events. Thread-safe."""

    _loop_lock = threading.Lock()
    _loop_runs = False

    def __init__(self, on_open: Callable[[str, libvirt.virConnect], None] = lambda _uri, _connection: None) -> None:
        self._on_open = on_open
        self._lock = threading.Lock()
        self._open: dict[str, libvirt.virConnect] = {}

    def get(self, uri: str) -> libvirt.virConnect:
        """A live connection to ``uri``; raises ``HypervisorUnreachable``."""
        self._run_event_loop()
        with self._lock:
            held = self._open.get(uri)
            if held is not None and self._alive(held):
                return held
            try:
                fresh = libvirt.open(uri)
                fresh.setKeepAlive(KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT)
            except libvirt.libvirtError as error:
                raise HypervisorUnreachable(
                    f"libvirt does not answer at {uri}: {error.get_error_message()}.",
                    remedy="See whether libvirtd runs there and the URI is right: virsh -c URI list.",
                    uri=uri,
                ) from error
            self._open[uri] = fresh
        self._on_open(uri, fresh)
        return fresh

    def close(self) -> None:
        with self._lock:
            for connection in self._open.values():
                _quietly(connection.close)
            self._open.clear()

    @staticmethod
    def _alive(connection: libvirt.virConnect) -> bool:
        try:
            return bool(connection.isAlive()) and bool(connection.getLibVersion())
        except libvirt.libvirtError:
            return False

    @classmethod
    def _run_event_loop(cls) -> None:
        with cls._loop_lock:
            if not cls._loop_runs:
                # By default libvirt writes every error to standard error, beside raising it.
                libvirt.registerErrorHandler(lambda _context, _error: None, None)
                libvirt.virEventRegisterDefaultImpl()
                threading.Thread(target=_event_loop, name="libvirt-events", daemon=True).start()
                cls._loop_runs = True


def _event_loop() -> None:
    while True:
        libvirt.virEventRunDefaultImpl()


def _quietly(act: Callable[[], Any]) -> None:
    try:
        act()
    except libvirt.libvirtError:
        # A connection that is broken cannot be closed politely, and need not be.
        return
