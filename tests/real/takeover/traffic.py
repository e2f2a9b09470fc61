"""Functions that run inside a namespace: an echo server that names itself, and a client that never stops asking."""

from __future__ import annotations

import contextlib
import select
import socket
import time

_IP_FREEBIND = 15


def echo(address: str, name: str, port: int, seconds: float) -> int:
    """Answer UDP datagrams to ``address``, held or not, with ``name``; returns how many."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
        sock.bind((address, port))
        answered = 0
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if select.select([sock], [], [], left)[0]:
                data, peer = sock.recvfrom(64)
                with contextlib.suppress(OSError):  # the address, or the way back, is gone
                    sock.sendto(data + name.encode(), peer)
                    answered += 1
    return answered


def ask(address: str, port: int, until: str, deadline_s: float) -> tuple[float | None, float | None]:
    """Ask every millisecond until ``until`` answers: ``(last answer by another, first by until)``, CLOCK_MONOTONIC."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    last: float | None = None
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.connect((address, port))
        end = time.monotonic() + deadline_s
        while time.monotonic() < end:
            try:
                sock.send(b"?")
                sock.settimeout(0.001)
                answer = sock.recv(64)
            except OSError:  # a timeout, or an ICMP error of an earlier datagram
                continue
            if answer == b"?" + until.encode():
                return last, time.monotonic()
            last = time.monotonic()
    return last, None
