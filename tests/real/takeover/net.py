"""A small network of namespaces around one bridge, with a worker process inside each."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import subprocess
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

_T = TypeVar("_T")
_CLONE_NEWNET = 0x40000000


def ip(*args: str, check: bool = True) -> str:
    """Run ``ip``; returns its output."""
    done = subprocess.run(["ip", *args], check=False, capture_output=True, text=True)
    if check and done.returncode:
        raise RuntimeError(f"ip {' '.join(args)}: {done.stderr.strip()}")
    return done.stdout


def _enter(namespace: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/run/netns", namespace).open() as handle:
        if libc.setns(handle.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {namespace}")


class Host:
    """One namespace with ``eth0``; ``run`` executes a function in it, in a process that started beforehand."""

    def __init__(self, lan: Lan, name: str) -> None:
        self.namespace = f"{lan.prefix}{name}"
        ip("netns", "add", self.namespace)
        ip("-n", self.namespace, "link", "set", "lo", "up")
        # Duplicate address detection of the tests' own set-up would only make them wait.
        self.ip("netns", "exec", self.namespace, "sysctl", "-qw", "net.ipv6.conf.default.accept_dad=0", raw=True)
        peer = f"{name}0"
        ip("-n", lan.bridge, "link", "add", peer, "type", "veth", "peer", "name", "eth0", "netns", self.namespace)
        ip("-n", lan.bridge, "link", "set", peer, "master", "br0", "up")
        self.ip("link", "set", "eth0", "up")
        spawn = multiprocessing.get_context("spawn")
        self._workers = ProcessPoolExecutor(2, mp_context=spawn, initializer=_enter, initargs=(self.namespace,))
        for ready in [self._workers.submit(os.getpid) for _ in range(2)]:
            ready.result()

    def ip(self, *args: str, raw: bool = False) -> str:
        return ip(*args) if raw else ip("-n", self.namespace, *args)

    def mac(self) -> str:
        words = self.ip("-o", "link", "show", "eth0").split()
        return words[words.index("link/ether") + 1]

    def start(self, function: Callable[..., _T], *args: Any, **kwargs: Any) -> Future[_T]:
        return self._workers.submit(function, *args, **kwargs)

    def run(self, function: Callable[..., _T], *args: Any, **kwargs: Any) -> _T:
        return self.start(function, *args, **kwargs).result()

    def close(self) -> None:
        self._workers.shutdown()
        ip("netns", "del", self.namespace, check=False)


class Lan:
    """``with Lan("a", "b") as lan: lan["a"].run(...)``"""

    def __init__(self, *names: str) -> None:
        self.prefix = f"to{uuid.uuid4().hex[:6]}-"
        self.bridge = f"{self.prefix}br"
        self._names = names
        self._hosts: dict[str, Host] = {}

    def __enter__(self) -> Lan:
        ip("netns", "add", self.bridge)
        try:
            ip("-n", self.bridge, "link", "add", "br0", "type", "bridge", "forward_delay", "0", "mcast_snooping", "0")
            ip("-n", self.bridge, "link", "set", "br0", "up")
            for name in self._names:
                self._hosts[name] = Host(self, name)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._close()

    def __getitem__(self, name: str) -> Host:
        return self._hosts[name]

    def _close(self) -> None:
        for host in self._hosts.values():
            host.close()
        ip("netns", "del", self.bridge, check=False)
