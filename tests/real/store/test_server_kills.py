"""SIGKILL of a real server, a hundred times and more, at random moments of ingest, folding and recovery at once.

Three machines push, retention by bytes folds all the time, somebody reads old images. After each kill either the next
server takes over as it is, or the store is looked at first: what was acknowledged is there or folded, every image on
offer is the model's, and everything verifies. CDP_SEED plays the same load and moments again.
"""

from __future__ import annotations

import asyncio
import http.client
import os
import random
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from cdp.server.config import Limits, StoreFiles
from cdp.store import Store, verify
from journal import wire
from journal.decoder import decode
from journal.extent import Kind
from journal.position import Position
from journal.segment import Flags
from journal.wire import DiskInfo
from tests.harness.wait import wait_until
from tests.server.running import running
from tests.store.source import Source

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

KILLS: Final = 104
MACHINES: Final = 3
SIZES: Final = [512 << 10, 64 << 10]
FILE_BYTES: Final = 1 << 20
JOURNAL_BYTES: Final = 3 << 20
LIFE_S: Final = (0.02, 0.35)
CONFIG: Final = """
directory = "{directory}"
listen = ["127.0.0.1"]
port = {port}
log_level = "warning"
[store]
file_bytes = {file_bytes}
map_bytes = 268435456
[retention]
keep_s = 0.0
max_bytes = {journal_bytes}
interval_s = 0.05
"""


class Service:
    """``cdp server run`` as a process that is killed."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "state"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self._config = directory / "server.toml"
        self._config.write_text(
            CONFIG.format(directory=self.directory, port=self.port, file_bytes=FILE_BYTES, journal_bytes=JOURNAL_BYTES)
        )
        self.log = directory / "server.log"
        words = [sys.executable, "-m", "tests.real.store.nursery", str(self.log)]
        self._nursery = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.serving = threading.Event()

    def start(self) -> int:
        pid = int(self._ask(str(self._config)))
        self.serving.set()
        return pid

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        self.serving.clear()
        assert self._ask("wait") == "ended"

    def close(self) -> None:
        assert self._nursery.stdin is not None
        assert self._nursery.stdout is not None
        self._nursery.stdin.close()
        self._nursery.wait(20)
        self._nursery.stdout.close()

    def _ask(self, line: str) -> str:
        assert self._nursery.stdin is not None and self._nursery.stdout is not None
        self._nursery.stdin.write(line + "\n")
        self._nursery.stdin.flush()
        return self._nursery.stdout.readline().strip()


class Caller:
    """One HTTPS connection that is opened again when its server has died."""

    def __init__(self, service: Service, ca_pem: str, headers: dict[str, str]) -> None:
        self._service = service
        self._context = ssl.create_default_context(cadata=ca_pem)
        self._headers = headers
        self._connection: http.client.HTTPSConnection | None = None

    def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes] | None:
        """None: the server is not there, or died before it had answered."""
        try:
            if self._connection is None:
                self._connection = http.client.HTTPSConnection(
                    "127.0.0.1", self._service.port, timeout=20, context=self._context
                )
            self._connection.request(method, path, body, self._headers)
            answer = self._connection.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException):
            self.close()
            return None

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class Pusher(threading.Thread):
    """A machine: seals and pushes until it is told to end. ``lock`` guards the model."""

    def __init__(self, service: Service, source: Source, caller: Caller, seed: int, stop: threading.Event) -> None:
        super().__init__(name=f"pusher-{seed}")
        self._service = service
        self.source = source
        self._caller = caller
        self._random = random.Random(seed)
        self._stop_asked = stop
        self.lock = threading.Lock()
        self.acknowledged: list[Position] = []
        self.in_flight: Position | None = None
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            while not self._stop_asked.is_set():
                self._push()
        except BaseException as error:
            self.failure = error
            raise
        finally:
            self._caller.close()

    def _push(self) -> None:
        with self.lock:
            flags = self._random.choices([Flags.NONE, Flags.FUZZY, Flags.CONTINUES], [8, 1, 1])[0]
            if self._random.random() < 0.05:
                raw = self.source.encode([(0, 0, SIZES[0], Kind.DATA)], flags, compressible=False)
            else:
                raw = self.source.encode(self.source.random_writes(6), flags)
            position = next(reversed(self.source.sealed))
            del self.source.sealed[position]
            self.in_flight = position
        path = wire.SEGMENT.format(machine=self.source.machine, generation=position.generation, seq=position.seq)
        while not self._stop_asked.is_set():
            answer = self._caller.ask("PUT", path, raw)
            if answer is None:
                self._service.serving.wait(0.02)
                self._stop_asked.wait(0.02)
                continue
            assert answer[0] == 200, answer[1]
            with self.lock:
                self.acknowledged.append(position)
                self.source.accept(position)
                self.in_flight = None
            return

    def check(self, store: Store) -> int:
        """Against the store itself, while no server runs; returns how many images were compared."""
        machine = self.source.machine
        with self.lock:
            tip = store.live(machine)
            if tip != self.source.position:
                assert tip == self.in_flight, f"{tip.short} instead of {self.source.position.short}"
            points = [Position.parse(p.position) for p in store.recovery_points(machine, 0, 2**62).points]
            state = store.state(machine)
            for position in self.acknowledged:
                stored = store.entry(state, position.generation, position.seq) is not None
                assert stored or state.is_base(position) or not state.is_offered(position), f"{position.short} is lost"
            for position in {*points[:2], *points[-2:], *self._random.sample(points, min(2, len(points)))}:
                self.source.check(store, position)
            assert verify(store, machine).clean
            offered = state.base.target_position.seq if state.base is not None else 0
            self.acknowledged = [position for position in self.acknowledged if position.seq >= offered]
            self.source.images = {p: image for p, image in self.source.images.items() if p.seq >= offered}
            return len(points)


class Reader(threading.Thread):
    """Recovers ranges at random positions: right, or folded away meanwhile, or no answer."""

    def __init__(self, caller: Caller, pushers: list[Pusher], seed: int, stop: threading.Event) -> None:
        super().__init__(name="reader")
        self._caller = caller
        self._pushers = pushers
        self._random = random.Random(seed)
        self._stop_asked = stop
        self.read = 0
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            while not self._stop_asked.is_set():
                self._read()
        except BaseException as error:
            self.failure = error
            raise
        finally:
            self._caller.close()

    def _read(self) -> None:
        pusher = self._random.choice(self._pushers)
        with pusher.lock:
            if not pusher.acknowledged:
                return
            position = self._random.choice(pusher.acknowledged[-40:])
            expected = pusher.source.images[position]
        disk = self._random.randrange(len(SIZES))
        path = wire.IMAGE.format(machine=pusher.source.machine)
        answer = self._caller.ask("GET", f"{path}?at={position}&disk={disk}&offset=0&length={SIZES[disk]}")
        if answer is None:
            self._stop_asked.wait(0.02)
            return
        status, raw = answer
        if status in (404, 410):
            assert any(code in raw for code in (b"unknown-position", b"position-folded", b"segment-gone")), raw
            return
        assert status == 200, raw
        image = bytearray(SIZES[disk])
        for _, offset, _, length, data in decode(raw).writes():
            assert data is not None
            image[offset : offset + length] = data
        assert image == expected[disk], f"disk {disk} at {position.short}"
        self.read += 1


async def enrol(service: Service) -> tuple[str, dict[str, str], list[tuple[uuid.UUID, dict[str, str]]]]:
    """Machines and credentials, made before the first kill: CA, operator's headers, each machine's."""
    store = StoreFiles(file_bytes=FILE_BYTES, map_bytes=1 << 28)
    async with running(service.directory, store=store, limits=Limits()) as server:
        machines = []
        for number in range(MACHINES):
            machine, agent = await server.protected(f"db{number}")
            disks = [DiskInfo(index=n, name=f"vd{n}", size_bytes=size) for n, size in enumerate(SIZES)]
            server.server.store.update_disks(uuid.UUID(machine), disks)
            machines.append((uuid.UUID(machine), dict(agent.session.headers)))
        return server.ca_pem, dict(server.operator.session.headers), machines


@pytest.fixture
def service() -> Iterator[Service]:
    """On the real disk: what a kill leaves in memory is no different, but syncs take their time here."""
    directory = Path(tempfile.mkdtemp(prefix="cdp-kills-"))
    service = Service(directory)
    try:
        yield service
    finally:
        service.close()
        shutil.rmtree(directory)


def test_a_killed_server_loses_nothing_it_acknowledged(service: Service) -> None:
    seed = int(os.environ.get("CDP_SEED") or random.randrange(2**32))
    print("CDP_SEED", seed)
    choose = random.Random(seed)
    ca_pem, operator, machines = asyncio.run(enrol(service))
    stop = threading.Event()
    pushers = [
        Pusher(
            service,
            Source(machine, SIZES, Position.genesis(machine, 1, None), seed + number),
            Caller(service, ca_pem, headers),
            seed + number,
            stop,
        )
        for number, (machine, headers) in enumerate(machines)
    ]
    reader = Reader(Caller(service, ca_pem, operator), pushers, seed, stop)
    threads: list[Pusher | Reader] = [*pushers, reader]
    for thread in threads:
        thread.start()
    compared = folded = 0
    began = time.monotonic()
    try:
        for number in range(KILLS):
            pid = service.start()
            # A server that is killed while it opens its store is part of it; most live long enough to serve.
            if choose.random() < 0.85:
                wait_acknowledged(service, pushers, threads)
            time.sleep(choose.uniform(*LIFE_S))
            service.kill(pid)
            assert not failures(threads), failures(threads)
            if choose.random() < 0.25 or number == KILLS - 1:
                with Store.open(service.directory / "store", file_bytes=FILE_BYTES) as store:
                    compared += sum(pusher.check(store) for pusher in pushers)
                    folded = sum(
                        state.base.target_position.seq
                        for state in (store.state(machine) for machine, _ in machines)
                        if state.base is not None
                    )
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    stored = sum(pusher.source.position.seq for pusher in pushers)
    print(
        f"{KILLS} kills in {time.monotonic() - began:.0f} s: {stored} segments acknowledged, {folded} folded, "
        f"{compared} points on offer, {reader.read} images read through the server"
    )
    assert folded > 100 and reader.read > 100


def wait_acknowledged(service: Service, pushers: list[Pusher], threads: list[Pusher | Reader]) -> None:
    """Until the server has taken something."""
    before = [pusher.source.position for pusher in pushers]
    try:
        wait_until(
            lambda: [pusher.source.position for pusher in pushers] != before or failures(threads), 30, "a segment"
        )
    except TimeoutError:
        print(service.log.read_text()[-4000:])
        raise


def failures(threads: list[Pusher | Reader]) -> list[BaseException]:
    return [thread.failure for thread in threads if thread.failure is not None]
