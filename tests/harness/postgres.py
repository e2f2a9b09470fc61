"""A real PostgreSQL with its data and its WAL on two mounts of their own."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path

from tests.harness.mounts import MountNamespace
from tests.harness.process import Program, run

DATABASE = "postgres"
USER = "postgres"
SMALL: Mapping[str, str] = {
    "shared_buffers": "32MB",
    "max_wal_size": "96MB",
    "checkpoint_timeout": "30s",
    "max_connections": "20",
    "autovacuum_naptime": "5s",
}
"""For disks of some hundred MB: under load a checkpoint a second, so that every kind of write is always under way."""
AS_SHIPPED: Mapping[str, str] = {}
"""What PostgreSQL does where nobody configured it; a log of up to 1 GB."""


def binaries() -> Path:
    """The newest installed version's directory of programs."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[4]))
    assert found, "PostgreSQL is not installed: run deploy/install-packages"
    return found[-1].parent


class PostgresInstance:
    """Runs inside ``namespace`` as user postgres; reached through a socket in ``work_dir``, no TCP.

    ``data`` and ``wal`` are mount points; the cluster lies below them, so that lost+found does not disturb.
    """

    def __init__(
        self,
        name: str,
        namespace: MountNamespace,
        data: Path,
        wal: Path,
        work_dir: Path,
        log_dir: Path,
        *,
        settings: Mapping[str, str] = SMALL,
    ) -> None:
        self._namespace = namespace
        self._data = data / "cluster"
        self._wal = wal / "wal"
        self.sockets = work_dir / f"{name}-sockets"
        self.sockets.mkdir(parents=True)
        shutil.chown(self.sockets, USER)
        self._as_user = [
            *namespace.prefix,
            # Changing the user clears the death signal that the program was started with.
            *("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "--pdeathsig", "KILL"),
        ]
        private = {"listen_addresses": "", "unix_socket_directories": str(self.sockets)}
        options = [word for key, value in {**private, **settings}.items() for word in ("-c", f"{key}={value}")]
        self._server = Program(
            name,
            [*self._as_user, str(binaries() / "postgres"), "-D", str(self._data), *options],
            log_dir,
            ready=self._answers,
            ready_s=60,
            # Immediate shutdown: what a crash is to it, but its children end and its shared memory goes.
            stop_signal=signal.SIGQUIT,
        )

    def initialise(self) -> None:
        """initdb, with page checksums, so that a torn or misplaced page is an error and not a surprise."""
        for directory in (self._data, self._wal):
            self._namespace.run(["install", "-d", "-o", USER, "-m", "0700", str(directory)])
        run(
            [
                *self._as_user,
                str(binaries() / "initdb"),
                *("--pgdata", str(self._data), "--waldir", str(self._wal)),
                *("--auth", "trust", "--encoding", "UTF8", "--locale", "C", "--data-checksums", "--no-instructions"),
            ],
            deadline_s=120,
        )

    def adopt(self) -> None:
        """A recovered cluster: its link to the WAL names the original's mount point."""
        link = self._data / "pg_wal"
        self._namespace.run(["ln", "-sfn", str(self._wal), str(link)])
        self._namespace.run(["rm", "-f", str(self._data / "postmaster.pid")])

    def start(self) -> None:
        self._server.start()

    def stop(self) -> None:
        """Fast shutdown: SIGTERM would wait for the clients."""
        if self._server.running:
            os.kill(self._server.pid, signal.SIGINT)
            self._server.wait(60)

    def close(self) -> None:
        """End it by any means, without a checkpoint; never raises."""
        self._server.close()

    def psql(self, query: str, *, deadline_s: float = 60.0) -> str:
        """Rows as text, columns divided by ``|``."""
        return run(
            [*self.client("psql"), "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-c", query], deadline_s=deadline_s
        ).strip()

    def client(self, program: str) -> list[str]:
        """The beginning of a client program's command line."""
        # Over the socket any user may be postgres: authentication is "trust", the directory is private. The database is
        # not named by -d, which tells pgbench to print every transaction.
        return [
            "env", f"PGDATABASE={DATABASE}", str(binaries() / program), "-h", str(self.sockets), "-U", USER
        ]  # fmt: skip

    def verify(self) -> str:
        """Every page and index is sound, and no transaction of pgbench is there in part. Returns what was counted."""
        run([*self.client("pg_amcheck"), "--heapallindexed", "--install-missing"], deadline_s=120)
        sums = self.psql(
            "select (select sum(abalance) from pgbench_accounts), (select sum(tbalance) from pgbench_tellers),"
            " (select sum(bbalance) from pgbench_branches), (select coalesce(sum(delta), 0) from pgbench_history)"
        )
        assert len(set(sums.split("|"))) == 1, f"a transaction is there in part: {sums}"
        return self.psql("select count(*) from pgbench_history")

    def _answers(self) -> bool:
        done = run(self.client("pg_isready"), codes=(0, 1, 2, 3))
        return "accepting connections" in done
