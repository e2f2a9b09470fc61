"""The load that a database machine is: PostgreSQL with pgbench, and fsync logs, on two mounted disks; and the check
of a pair of images of them."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.harness import filesystem, fsynclog
from tests.harness.filesystem import FileSystem
from tests.harness.mounts import MountNamespace
from tests.harness.postgres import PostgresInstance
from tests.harness.process import Program, run

PGBENCH_SCALE = 3
PGBENCH_CLIENTS = 2
PGBENCH_TPS = 250
FSYNC_PAIRS_PER_S = 200
"""Leaves the other core to the agent, the server and the standby: the proof is about order, not speed."""
_INSTANCES = itertools.count()


class DatabaseLoad:
    """Data on the first device, WAL on the second, a fsync log on both. ``notes`` tells what was fsynced when."""

    def __init__(
        self, kind: FileSystem, devices: tuple[Path, Path], namespace: MountNamespace, work_dir: Path, log_dir: Path
    ) -> None:
        self.notes = work_dir / "fsync.notes"
        self._kind = kind
        self._devices = devices
        self._namespace = namespace
        self._mounts = (work_dir / "mnt" / "data", work_dir / "mnt" / "wal")
        self._postgres = PostgresInstance("postgres", namespace, *self._mounts, work_dir, log_dir)
        logs = [str(mount / fsynclog.LOG_NAME) for mount in self._mounts]
        # As a script: inside the namespace nothing but the standard library is needed, and it starts at once.
        self._writer = Program(
            "fsynclog",
            [*namespace.prefix, sys.executable, fsynclog.__file__, *logs, str(self.notes), str(FSYNC_PAIRS_PER_S)],
            log_dir,
        )
        self._pgbench = Program(
            "pgbench",
            [
                *self._postgres.client("pgbench"),
                "-n",
                "-c",
                str(PGBENCH_CLIENTS),
                "-R",
                str(PGBENCH_TPS),
                "-T",
                "86400",
            ],
            log_dir,
        )

    def __enter__(self) -> Self:
        """File systems, cluster and tables are made; the load runs when this returns."""
        try:
            for device, mount in zip(self._devices, self._mounts, strict=True):
                filesystem.make(self._kind, device)
                self._namespace.mount(device, mount)
            self._postgres.initialise()
            self._postgres.start()
            run([*self._postgres.client("pgbench"), "-i", "-q", "-s", str(PGBENCH_SCALE)], deadline_s=120)
            self._writer.start()
            self._pgbench.start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def check_running(self) -> None:
        for program in (self._writer, self._pgbench):
            assert program.running, program.log_tail()

    def finish(self) -> None:
        """End the load and unmount: the devices hold the file systems' last state."""
        self.check_running()
        self._writer.kill_for_good()
        self._pgbench.kill_for_good()
        self._postgres.stop()
        for mount in reversed(self._mounts):
            self._namespace.unmount(mount)

    def _end(self) -> None:
        self._writer.kill_for_good()
        self._pgbench.kill_for_good()
        self._postgres.close()


def check_pair(
    kind: FileSystem,
    images: tuple[Path, Path],
    sealed_ns: int,
    notes: fsynclog.Notes,
    namespace: MountNamespace,
    work_dir: Path,
    log_dir: Path,
    *,
    postgres: bool = False,
) -> fsynclog.Verdict:
    """Replay the logs of a recovered pair, judge its fsync logs, with ``postgres`` let the database recover, and fsck.

    Raises ``ImageUnsound`` if a file system is broken, ``ProgramFailed`` or ``AssertionError`` if the database is.
    The images are changed.
    """
    with filesystem.mounted(kind, images, namespace, work_dir / "check") as (data, wal):
        try:
            logs = (namespace.read(data / fsynclog.LOG_NAME), namespace.read(wal / fsynclog.LOG_NAME))
        except OSError as error:
            raise filesystem.ImageUnsound(f"a log cannot be read: {error}") from error
        if postgres:
            # One moment may be checked more than once.
            name = f"recovered-{sealed_ns}-{next(_INSTANCES)}"
            database = PostgresInstance(name, namespace, data, wal, work_dir, log_dir)
            database.adopt()
            try:
                database.start()
                database.verify()
                database.stop()
            finally:
                database.close()
    return notes.judge(logs, sealed_ns)
