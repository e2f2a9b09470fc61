"""The drainer: ``python -m cdp.agent.capture.drain --pin-dir D --spool-dir S --spool-bytes N``.

A process of its own, because it must wait for nothing: real-time priority, memory locked, no numpy, no event loop.
One pass, with what a SIGKILL leaves behind after each step:

    1. now, then the producer position         nothing
    2. records → chunk file, at their position  bytes beyond ``drained``: not read, and rewritten by the next drainer
    3. ``drained`` → state                     the ring still holds them: the next drainer writes the same bytes again
    4. consumer position → ring                the cursor, last: the next drainer continues here
    5. mark (now, producer) → state            a mark less: the next pass writes a later one

If the spool is full, the pass ends early, the ring fills, and the kernel side stamps what it loses.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import gc
import json
import mmap
import os
import select
import signal
import stat
import sys
import time
from pathlib import Path

from cdp.agent.capture import layout, libbpf, pins
from cdp.agent.capture.control import Control
from cdp.agent.capture.devices import disks_under
from cdp.agent.capture.errors import DrainerBusy, SpoolOnProtectedDisk
from cdp.agent.capture.layout import CHUNK_BYTES, MARKS, STATE_BYTES, STATE_HEADER_BYTES
from cdp.agent.capture.ring import Ring
from journal.errors import CdpError

STEP_BYTES = layout.RECORD_BYTES * 252
"""About 1 MiB: after so much, space in the ring is given back."""
MARK_NS_MIN = 10_000_000
PASS_S = 0.1
"""Passes cost more than bytes: with an eighth of the ring filled the kernel wakes the drainer before this is over, and
whoever needs a mark pokes it."""
FULL_S = 0.005
SPARE_CHUNKS = 1
"""Released files kept for reuse: a recycled file costs no page clearing, a kept one costs memory."""
LOCK_WAIT_S = 5.0
PRIORITY = 10
_MCL_CURRENT_FUTURE_ONFAULT = 1 | 2 | 4


class SpoolWriter:
    """Chunk files and the state file. The other side is ``spool.RawSpool``."""

    def __init__(self, directory: Path, capture_id: int, spool_bytes: int, position: int) -> None:
        self._directory = directory
        self._chunks_max = max(layout.SPOOL_CHUNKS_MIN, spool_bytes // CHUNK_BYTES)
        self._chunk: tuple[int, int] | None = None
        self._open_state(capture_id, spool_bytes, position)
        self._starts = sorted(self._chunks())

    def _open_state(self, capture_id: int, spool_bytes: int, position: int) -> None:
        """Continue the spool of this capture, or start it afresh over the remains of another one's."""
        path = self._directory / layout.STATE_FILE
        if not path.exists() or not self._map_state(path) or self.fields[layout.F_CAPTURE_ID] != capture_id:
            for start in self._chunks():
                (self._directory / layout.chunk_name(start)).unlink()
            fresh = path.with_name("state.partial")
            words = [0] * (STATE_HEADER_BYTES // 8)
            words[layout.F_MAGIC] = layout.STATE_MAGIC
            words[layout.F_VERSION] = layout.STATE_VERSION
            words[layout.F_CAPTURE_ID] = capture_id
            words[layout.F_DRAINED] = words[layout.F_RELEASED] = position
            fresh.write_bytes(b"".join(word.to_bytes(8, "little") for word in words).ljust(STATE_BYTES, b"\0"))
            fresh.rename(path)
            self._map_state(path)
        self.fields[layout.F_SPOOL_BYTES] = spool_bytes
        self.fields[layout.F_PID] = os.getpid()

    def _chunks(self) -> list[int]:
        starts = (layout.chunk_of_name(path.name) for path in self._directory.iterdir())
        return [start for start in starts if start is not None]

    def _map_state(self, path: Path) -> bool:
        with path.open("r+b") as file:
            if os.fstat(file.fileno()).st_size != STATE_BYTES:
                return False
            view = memoryview(mmap.mmap(file.fileno(), STATE_BYTES))
        self.fields = view[:STATE_HEADER_BYTES].cast("Q")
        self._marks = view[STATE_HEADER_BYTES:].cast("Q")
        known = (layout.STATE_MAGIC, layout.STATE_VERSION)
        return (self.fields[layout.F_MAGIC], self.fields[layout.F_VERSION]) == known

    def room(self, position: int) -> bool:
        """May a record be written at ``position``? False while the reader has not released enough."""
        oldest = layout.chunk_start(self.fields[layout.F_RELEASED])
        return (layout.chunk_start(position) - oldest) // CHUNK_BYTES < self._chunks_max

    def write(self, position: int, pieces: list[memoryview]) -> None:
        """All of ``pieces`` (within one chunk) at ``position``. Raises ``OSError``; a repetition is harmless."""
        start = layout.chunk_start(position)
        if self._chunk is None or self._chunk[0] != start:
            self._turn(start)
        assert self._chunk is not None
        at = position - start
        while pieces:
            written = os.pwrite(self._chunk[1], pieces[0], at)
            at += written
            pieces = [pieces[0][written:], *pieces[1:]] if written < len(pieces[0]) else pieces[1:]

    def publish(self, monotonic_ns: int, position: int) -> None:
        count = self.fields[layout.F_MARK_COUNT]
        at = count % MARKS * 2
        self._marks[at] = monotonic_ns
        self._marks[at + 1] = position
        self.fields[layout.F_MARK_COUNT] = count + 1

    def tidy(self) -> None:
        """Delete released files beyond the spare one."""
        released = self.fields[layout.F_RELEASED]
        free = [start for start in self._starts if start + CHUNK_BYTES <= released]
        for start in free[: max(0, len(free) - SPARE_CHUNKS)]:
            (self._directory / layout.chunk_name(start)).unlink(missing_ok=True)
            self._starts.remove(start)

    def _turn(self, start: int) -> None:
        """Go on to the file that begins at ``start``: the one that is there, a released one, or a new one."""
        path = self._directory / layout.chunk_name(start)
        if start not in self._starts:
            released = self.fields[layout.F_RELEASED]
            if self._starts and self._starts[0] + CHUNK_BYTES <= released:
                (self._directory / layout.chunk_name(self._starts.pop(0))).rename(path)
            self._starts.append(start)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(fd, CHUNK_BYTES)  # sparse: the reader may map the whole of it
        if self._chunk is not None:
            os.close(self._chunk[1])
        self._chunk = (start, fd)
        self.tidy()


class Drainer:
    """Ring → spool. ``run`` returns after SIGTERM with everything submitted so far in the spool."""

    def __init__(self, pin_dir: Path, spool_dir: Path, spool_bytes: int) -> None:
        fds = pins.open_maps(pin_dir, ("ring", "control", "disks"))
        check_spool_place(spool_dir, fds["disks"])
        control = Control(fds["control"])
        self._ring = Ring(fds["ring"], libbpf.map_entries(fds["ring"]))
        self._lock = lock_spool(spool_dir)
        self._spool = SpoolWriter(spool_dir, control.capture_id, spool_bytes, self._ring.consumer)
        control.close()
        self._pending: tuple[int, int] | None = None
        self._marked_ns = 0
        self._poke = open_poke(spool_dir)
        self._events = select.epoll()
        # Edge-triggered: the level would be high whenever a record is there, and this would never sleep.
        self._events.register(fds["ring"], select.EPOLLIN | select.EPOLLET)
        self._events.register(self._poke, select.EPOLLIN)
        self._stopping = False

    def set_realtime(self, granted: bool) -> None:
        self._spool.fields[layout.F_REALTIME] = int(granted)

    def stop(self, *_: object) -> None:
        self._stopping = True

    def run(self) -> None:
        urgent = False
        while True:
            stopping = self._stopping
            full = self.drain(urgent=urgent or stopping)
            if stopping:
                return
            urgent = False
            for fd, _ in self._events.poll(FULL_S if full else PASS_S):
                if fd == self._poke:
                    os.read(self._poke, 4096)
                    urgent = True

    def drain(self, *, urgent: bool) -> bool:
        """One pass; whether the spool was full. ``urgent``: publish a mark however recent the last."""
        ring, spool = self._ring, self._spool
        now = time.monotonic_ns()
        producer = ring.producer
        position = ring.consumer
        full = False
        end = ring.ready(position, producer)
        while position < end:
            if not spool.room(position):
                full = True
                break
            stop = min(end, position + STEP_BYTES, layout.chunk_start(position) + CHUNK_BYTES)
            try:
                spool.write(position, ring.pieces(position, stop))
            except OSError:
                # The file system is full or failing: the ring fills, losses are stamped, the counter tells.
                full = True
                break
            position = stop
            spool.fields[layout.F_DRAINED] = max(spool.fields[layout.F_DRAINED], position)
            ring.consumer = position
        if full:
            spool.fields[layout.F_STALLED_PASSES] += 1
        self._mark(now, producer, position, urgent)
        spool.fields[layout.F_PASS_NS] = now
        spool.tidy()
        return full

    def _mark(self, now: int, producer: int, position: int, urgent: bool) -> None:
        """A pass that stopped at a busy record or a full spool owes its mark until a later pass gets there."""
        if self._pending is None and (urgent or now - self._marked_ns >= MARK_NS_MIN):
            self._pending = (now, producer)
        if self._pending is not None and self._pending[1] <= position:
            self._spool.publish(*self._pending)
            self._marked_ns = self._pending[0]
            self._pending = None


def check_spool_place(spool_dir: Path, disks_fd: int) -> None:
    """Raises ``SpoolOnProtectedDisk``: each drained byte would be captured and drained again."""
    spool_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    device = spool_dir.stat().st_dev
    below = disks_under(os.major(device), os.minor(device))
    if any((disk.major, disk.minor) in below for disk in pins.disks(disks_fd)):
        raise SpoolOnProtectedDisk(
            f"{spool_dir} lies on a protected disk.",
            remedy="Use a directory on tmpfs, such as /run/cdp/raw, or on an unprotected disk.",
            path=str(spool_dir),
        )


def lock_spool(spool_dir: Path) -> int:
    """The descriptor that holds the lock. A predecessor that is just being killed gets a moment to go."""
    fd = os.open(spool_dir / layout.LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    end = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                os.close(fd)
                raise DrainerBusy(
                    f"Another drainer holds {spool_dir}.",
                    remedy="Stop the other agent; one machine has one.",
                    path=str(spool_dir),
                ) from None
            time.sleep(0.01)
        else:
            return fd


def open_poke(spool_dir: Path) -> int:
    """The named pipe by which the reader asks for a pass at once; open for both ways, so that it never hangs up."""
    path = spool_dir / layout.POKE_FILE
    if not path.exists() or not stat.S_ISFIFO(path.stat().st_mode):
        path.unlink(missing_ok=True)
        os.mkfifo(path, 0o600)
    return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)


def become_realtime() -> bool:
    """Real-time priority where the control group grants it, else the best there is; memory is never swapped out."""
    ctypes.CDLL(None).mlockall(_MCL_CURRENT_FUTURE_ONFAULT)
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(PRIORITY))
    except OSError:
        os.setpriority(os.PRIO_PROCESS, 0, -20)
        return False
    return True


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="cdp-drain", description="Copies the capture ring to the raw spool.")
    parser.add_argument("--pin-dir", type=Path, required=True)
    parser.add_argument("--spool-dir", type=Path, required=True)
    parser.add_argument("--spool-bytes", type=int, required=True)
    options = parser.parse_args(arguments)
    try:
        drainer = Drainer(options.pin_dir, options.spool_dir, options.spool_bytes)
    except CdpError as error:
        # The supervisor reads this line; the exit code says that a retry will not help by itself.
        sys.stderr.write(json.dumps(error.as_dict()) + "\n")
        return 75 if error.transient else 78
    drainer.set_realtime(become_realtime())
    signal.signal(signal.SIGTERM, drainer.stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's; the supervisor decides when this ends
    gc.collect()
    gc.freeze()
    gc.disable()
    drainer.run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
