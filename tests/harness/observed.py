"""What is stored of a machine and where its standby is, as asked from the server; and waiting for it."""

from __future__ import annotations

import contextlib
import secrets
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from cdp.server import messages
from journal.position import Position
from journal.segment import Header
from journal.wire import MachineState
from tests.harness import images
from tests.harness.client import Client
from tests.harness.loop import LoopDisk, drop_caches
from tests.harness.wait import wait_until

NAME = "plant"
CONSUMER = "standby"
IMAGE_STEP_BYTES = 32 << 20
"""Half of what one answer may carry."""
CLOCKS_APART_NS_MAX = 100_000_000
"""Wall time and monotonic time of one header, as this host's clocks relate."""


class Observed(ABC):
    """``disks``: the protected ones; ``targets``: the standby's."""

    disks: Sequence[LoopDisk]
    targets: Sequence[LoopDisk]
    work_dir: Path
    machine: uuid.UUID

    def __init__(self) -> None:
        self._headers: dict[Position, Header] = {}

    @property
    @abstractmethod
    def client(self) -> Client: ...

    # --- state ----------------------------------------------------------------------------------------------------
    def state(self) -> MachineState:
        return self.client.state(self.machine)

    def status(self) -> messages.MachineStatus:
        return self.client.status(NAME)

    def tip(self) -> Position:
        return Position.parse(self.state().tip)

    def header(self, position: Position) -> Header:
        if position not in self._headers:
            header = self.client.header(self.machine, position)
            wall_ahead = time.time_ns() - time.monotonic_ns()
            assert abs(header.sealed_at_ns - header.sealed_monotonic_ns - wall_ahead) < CLOCKS_APART_NS_MAX
            self._headers[header.position] = header
        return self._headers[position]

    def sealed_ns(self, position: Position) -> int:
        """When it was sealed, by the monotonic clock."""
        return self.header(position).sealed_monotonic_ns

    def contains(self, position: Position) -> bool:
        """Is it readable, and the same?"""
        found = self.client.header(self.machine, position)
        return found.position == position

    def history(self) -> list[Header]:
        """Every stored segment, oldest first."""
        at = Position.genesis(self.machine, 1, None)
        headers: list[Header] = []
        while entries := self.client.feed(self.machine, at, "tip").entries:
            positions = [Position.parse(entry.position) for entry in entries]
            headers += [self.header(position) for position in positions]
            at = positions[-1]
        return headers

    def recovery_points(self) -> list[Position]:
        return [header.position for header in self.history() if header.is_recovery_point]

    def position_at(self, monotonic_ns: int) -> Position:
        """The newest recovery point sealed at or before that moment."""
        return [at for at in self.recovery_points() if self.sealed_ns(at) <= monotonic_ns][-1]

    def agent_report(self) -> messages.AgentStatus:
        return self.status().agent

    # --- waiting --------------------------------------------------------------------------------------------------
    def wait_recovery_point(self, deadline_s: float = 60.0) -> Position:
        """The first recovery point that there is."""
        self._wait(lambda: self.state().recovery_point, deadline_s, "a recovery point")
        return self.recovery_points()[0]

    def settle(self, deadline_s: float = 30.0) -> Position:
        """A stored recovery point that holds everything written before this call."""
        now = time.monotonic_ns()
        found: list[Position] = []

        def covered() -> bool:
            text = self.state().recovery_point
            position = Position.parse(text) if text else None
            if position is None or position.is_genesis or self.sealed_ns(position) < now:
                return False
            found.append(position)
            return True

        self._wait(covered, deadline_s, "a recovery point of now")
        return found[-1]

    def wait_progress(self, deadline_s: float = 30.0) -> None:
        """Until the server has stored more than now."""
        before = self.tip()
        self._wait(lambda: self.tip() > before, deadline_s, f"more than {before.short}")

    def wait_applied(self, position: Position, deadline_s: float = 60.0) -> None:
        """Until the standby has acknowledged ``position``, or a later one."""

        def applied() -> bool:
            at = self.client.cursor(self.machine, CONSUMER)
            return at is not None and at >= position

        self._wait(applied, deadline_s, f"the standby at {position.short}")

    def _wait(self, condition: Callable[[], object], deadline_s: float, what: str) -> None:
        """A server that is being restarted is no answer yet."""

        def answered() -> object:
            try:
                return condition()
            except OSError:
                return False

        try:
            wait_until(answered, deadline_s, what, poll_s=0.1)
        except TimeoutError as error:
            with contextlib.suppress(OSError):
                error.add_note(f"status: {msgspec.json.encode(self.status()).decode()}")
            raise

    # --- recovery -------------------------------------------------------------------------------------------------
    def recover(self, position: Position, disk: int) -> Path:
        """The disk at that position as a sparse raw file; the caller unlinks it."""
        path = self.work_dir / f"recovered-{disk}-{secrets.token_hex(4)}.img"
        size = self.disks[disk].size_bytes
        with path.open("xb") as file:
            file.truncate(size)
            for offset in range(0, size, IMAGE_STEP_BYTES):
                length = min(IMAGE_STEP_BYTES, size - offset)
                for _, at, _, _, data in self.client.image(self.machine, position, disk, offset, length).writes():
                    if data is not None:
                        file.seek(at)
                        file.write(data)
        return path

    def recover_all(self, position: Position) -> tuple[Path, ...]:
        return tuple(self.recover(position, disk) for disk in range(len(self.disks)))

    def check_ends_equal(self, last: Position, recovered: Sequence[Path]) -> None:
        """The recovered images and the standby's disks equal the quiet protected disks, byte for byte."""
        for disk, target, image in zip(self.disks, self.targets, recovered, strict=True):
            drop_caches(disk.device)
            images.assert_equal(disk.device, image, f"recovered at {last.short}")
            images.assert_equal(disk.device, target.device, f"the standby at {last.short}")
