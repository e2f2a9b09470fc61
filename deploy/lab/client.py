"""The load client: numbered rows, one after the other, at the service address, without pause, for ever.

    python -m deploy.lab.client load HOST LOG      commit rows; LOG gets a line per acknowledged commit
    python -m deploy.lab.client rows HOST          print the numbers of all rows that the table has

A line of LOG: ``NUMBER STARTED ACKNOWLEDGED SERVER``; times are CLOCK_MONOTONIC seconds, SERVER tells one start of
PostgreSQL from another. Every attempt has a number of its own: a commit whose answer was lost may be in the table or
not, and is not repeated, so that "acknowledged" stays exact.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psycopg

PORT = 5432
DATABASE = "lab"
USER = "lab"
SCHEMA = "CREATE TABLE entry (number bigint PRIMARY KEY, payload text NOT NULL, at timestamptz NOT NULL DEFAULT now())"

KNOCK_S = 0.25
"""How long to wait for a TCP handshake before trying again: the resolution of what the client sees of a downtime."""
PAUSE_S = 0.02
"""After a refused connection."""
CONNECT_S = 10.0
COMMIT_S = 5.0
"""An answer that takes longer is lost. Long enough for an emulated machine that boots beside it."""
_PAYLOAD = "x" * 600


@dataclass(frozen=True, slots=True)
class Commit:
    """One acknowledged commit. ``server`` is the start time of the PostgreSQL that answered."""

    number: int
    started_s: float
    acknowledged_s: float
    server: str

    @classmethod
    def parse(cls, line: str) -> Commit:
        number, started, acknowledged, server = line.split()
        return cls(int(number), float(started), float(acknowledged), server)

    def __str__(self) -> str:
        return f"{self.number} {self.started_s:.6f} {self.acknowledged_s:.6f} {self.server}"


def read_log(path: Path) -> list[Commit]:
    """All whole lines so far."""
    if not path.exists():
        return []
    whole, _, _ = path.read_text().rpartition("\n")
    return [Commit.parse(line) for line in whole.splitlines()]


class Load:
    def __init__(self, host: str, log: Path) -> None:
        self._host = host
        self._log = log.open("a", buffering=1)
        self._number = 0

    async def run(self) -> None:
        """Until the process is ended."""
        while True:
            await self._knock()
            try:
                async with asyncio.timeout(CONNECT_S):
                    connection = await _connect(self._host)
            except (psycopg.Error, TimeoutError):
                continue
            try:
                await self._commit_on(connection)
            except (psycopg.Error, TimeoutError):
                # Not awaited: closing politely would wait for a server that is gone.
                connection.pgconn.finish()

    async def _commit_on(self, connection: psycopg.AsyncConnection[tuple[str]]) -> None:
        async with asyncio.timeout(COMMIT_S):
            row = await (
                await connection.execute("SELECT extract(epoch FROM pg_postmaster_start_time())::text")
            ).fetchone()
        assert row is not None
        while True:
            self._number += 1
            started_s = time.monotonic()
            async with asyncio.timeout(COMMIT_S):
                await connection.execute("INSERT INTO entry VALUES (%s, %s)", (self._number, _PAYLOAD))
            self._log.write(f"{Commit(self._number, started_s, time.monotonic(), row[0])}\n")

    async def _knock(self) -> None:
        """Return once the port accepts: asked with short patience, so that a silent address costs little time."""
        loop = asyncio.get_running_loop()
        while True:
            with socket.socket(socket.AF_INET6 if ":" in self._host else socket.AF_INET) as knock:
                knock.setblocking(False)
                try:
                    async with asyncio.timeout(KNOCK_S):
                        await loop.sock_connect(knock, (self._host, PORT))
                    return
                except TimeoutError:
                    continue
                except OSError:
                    await asyncio.sleep(PAUSE_S)


async def _connect(host: str) -> psycopg.AsyncConnection[tuple[str]]:
    return await psycopg.AsyncConnection.connect(
        host=host,
        port=PORT,
        dbname=DATABASE,
        user=USER,
        autocommit=True,
        connect_timeout=int(CONNECT_S),
        # A peer that vanished without a word is given up after this many milliseconds.
        tcp_user_timeout=1000,
    )


async def _rows(host: str) -> None:
    async with asyncio.timeout(60):
        connection = await _connect(host)
        cursor = await connection.execute("SELECT number::text FROM entry ORDER BY number")
        print("\n".join([row[0] for row in await cursor.fetchall()]))  # noqa: T201  this is what it is for
        await connection.close()


def main() -> None:
    match sys.argv[1:]:
        case ["load", host, log]:
            asyncio.run(Load(host, Path(log)).run())
        case ["rows", host]:
            asyncio.run(_rows(host))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
