"""A real MariaDB with its data on a mount of its own."""

from __future__ import annotations

import shutil
import signal
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.harness.mounts import MountNamespace
from tests.harness.process import Program, run

USER = "mysql"


class MariadbInstance:
    """Runs inside ``namespace`` as user mysql; reached through a socket in ``work_dir``, no TCP. ``mount`` is a mount
    point; the data directory lies below it."""

    def __init__(self, name: str, namespace: MountNamespace, mount: Path, work_dir: Path, log_dir: Path) -> None:
        self._namespace = namespace
        self._data = mount / "mariadb"
        sockets = work_dir / f"{name}-sockets"
        sockets.mkdir(parents=True)
        shutil.chown(sockets, USER)
        self.socket = sockets / "socket"
        self._server = Program(
            name,
            [
                *namespace.prefix,
                # Changing the user clears the death signal that the program was started with.
                *("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "--pdeathsig", "KILL"),
                *("mariadbd", "--no-defaults", "--skip-networking", "--skip-log-bin", f"--datadir={self._data}"),
                *(f"--socket={self.socket}", f"--pid-file={sockets / 'pid'}"),
                *("--innodb-buffer-pool-size=32M", "--innodb-log-file-size=32M", "--performance-schema=off"),
            ],
            log_dir,
            ready=self._answers,
            ready_s=60,
            # What a crash is to it.
            stop_signal=signal.SIGKILL,
        )

    def initialise(self) -> None:
        self._namespace.run(["install", "-d", "-o", USER, "-m", "0700", str(self._data)])
        self._namespace.run(
            [
                *("mariadb-install-db", "--no-defaults", f"--user={USER}", f"--datadir={self._data}"),
                *("--auth-root-authentication-method=normal", "--skip-test-db", "--innodb-log-file-size=32M"),
            ]
        )

    def start(self) -> None:
        self._server.start()

    def close(self) -> None:
        """End it without a shutdown; never raises."""
        self._server.close()

    @property
    def log(self) -> str:
        return self._server.log.read_text(errors="replace")

    @property
    def client(self) -> list[str]:
        """The beginning of a client's command line."""
        return ["mariadb", "--no-defaults", f"--socket={self.socket}", "-uroot", "--batch", "--skip-column-names"]

    def sql(self, statements: str) -> str:
        """Rows as text, columns divided by tabs."""
        return run([*self.client, "-e", statements]).strip()

    def _answers(self) -> bool:
        return "alive" in run(
            ["mariadb-admin", "--no-defaults", f"--socket={self.socket}", "-uroot", "ping"], codes=(0, 1)
        )


class Session:
    """One client that stays connected; ``ask`` blocks until the last statement's one row is there."""

    def __init__(self, instance: MariadbInstance) -> None:
        self._process = subprocess.Popen(
            [*instance.client, "--unbuffered"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self, statements: str) -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(statements + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()
