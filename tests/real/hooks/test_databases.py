"""PostgreSQL and MariaDB under load, with the hooks that are shipped, on file systems that are frozen: what an
application-consistent bookmark promises, and that nothing stays frozen whatever is killed in between."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import psycopg
import pytest

from cdp.server import messages as m
from journal import wire
from journal.errors import CdpError
from journal.position import Position
from tests.harness import filesystem
from tests.harness.acked import AckedRows
from tests.harness.loop import LoopDisk
from tests.harness.mariadb import MariadbInstance, Session
from tests.harness.observed import NAME
from tests.harness.plant import Plant
from tests.harness.postgres import PostgresInstance
from tests.harness.process import run
from tests.harness.wait import wait_until

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

DISK_BYTES = 256 << 20
FREEZE_S = 4.0
REDO_BYTES_MAX = 16 << 20
"""What is written between the checkpoint and the freeze, a moment later."""


class Site:
    """The plant with a database on each of its two disks, and a third hook, which does what ``trouble`` says."""

    def __init__(self, plant: Plant) -> None:
        self.plant = plant
        work, log, spaces = plant.work_dir, plant.log_dir, plant.namespace
        self.mounts = (work / "mnt" / "pg", work / "mnt" / "maria")
        self.postgres = PostgresInstance("postgres", spaces, self.mounts[0], self.mounts[0], work, log)
        self.mariadb = MariadbInstance("mariadb", spaces, self.mounts[1], work, log)
        self._trouble = work / "trouble"
        self._toml = work / "agent.toml"

    def start(self) -> None:
        plant = self.plant
        for disk, mount in zip(plant.disks, self.mounts, strict=True):
            filesystem.make("ext4", disk.device)
            plant.namespace.mount(disk.device, mount)
        for database in (self.postgres, self.mariadb):
            database.initialise()
            database.start()
        self.postgres.psql("create table rows (id int primary key, filler text)")
        self.mariadb.sql(
            "create database load_; create table load_.safe (id int primary key, filler text) engine=innodb;"
            "create table load_.plain (id int primary key, filler text) engine=myisam"
        )
        hooks = plant.work_dir / "hooks"
        hooks.mkdir()
        hook = hooks / "trouble"
        hook.write_text(f"#!/bin/sh\nset -eu\necho ready\nread -r _\n. {self._trouble}\necho frozen\ncat >/dev/null\n")
        hook.chmod(0o755)
        self.trouble("true")
        # The mounts are the namespace's alone, so that nobody else pins them.
        inside = [f"/proc/{plant.namespace.holder_pid}/root{mount}" for mount in self.mounts]
        self.inside = [Path(path) for path in inside]
        plant.agent_toml = f"""
            [bookmark]
            hooks = ["postgresql", "mariadb", "trouble"]
            hook_dir = "{hooks}"
            freeze = {inside}
            freeze_s = {FREEZE_S}
            [bookmark.environment]
            PGHOST = "{self.postgres.sockets}"
            CDP_MARIADB = "mariadb --no-defaults --socket={self.mariadb.socket} -uroot"
        """
        plant.start_server()
        plant.enrol()
        plant.start_agent()
        plant.protect()
        plant.wait_recovery_point()

    def close(self) -> None:
        print(self.plant.agent.log_tail())
        self.postgres.close()
        self.mariadb.close()

    def trouble(self, shell: str) -> None:
        self._trouble.write_text(shell + "\n")

    def bookmark(self, name: str, *, application: bool = True) -> wire.BookmarkInfo:
        """As an operator asks for it."""
        self.wait_following()
        request = wire.BookmarkRequest(name=name, application=application, wait_s=60)
        raw = self.plant.client.ask("POST", m.BOOKMARKS.format(name=NAME), body=request)
        return msgspec.json.decode(raw, type=wire.BookmarkInfo)

    def wait_following(self) -> None:
        """A busy host may lose a write to a full ring: then there is a resync first."""
        wait_until(lambda: self.plant.agent_report().state == "following", 60, "recovery points")

    def bookmarks(self) -> list[str]:
        return [one.name for one in self.plant.client.get(list[wire.BookmarkInfo], m.BOOKMARKS.format(name=NAME))]

    def own(self, *words: str) -> subprocess.Popen[str]:
        """``cdp agent bookmark`` on the machine."""
        self.wait_following()
        command = [*self.plant.agent.argv[:-3], "bookmark", *words, "--json", "--config", str(self._toml)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def touch(self) -> subprocess.Popen[bytes]:
        """Ends when the first file system lets it write."""
        return subprocess.Popen(["touch", str(self.inside[0] / "touched")])

    @contextmanager
    def load(self) -> Iterator[tuple[AckedRows, AckedRows]]:
        self.postgres.psql("truncate rows")
        self.mariadb.sql("truncate load_.safe; truncate load_.plain")
        with (
            psycopg.connect(host=str(self.postgres.sockets), user="postgres", autocommit=True) as connection,
            Session(self.mariadb) as session,
        ):

            def into_postgres(number: int) -> None:
                connection.execute("insert into rows values (%s, repeat('x', 500))", (number,))

            def into_mariadb(number: int) -> None:
                values = f"values ({number}, repeat('x', 500))"
                said = session.ask(
                    f"insert into load_.safe {values}; insert into load_.plain {values}; select {number};"
                )
                assert said == str(number), said

            with AckedRows(into_postgres) as one, AckedRows(into_mariadb) as two:
                wait_until(lambda: min(one.acked, two.acked) > 50, 30, "the first rows")
                yield one, two
                one.check()
                two.check()


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with Plant(sizes=(DISK_BYTES, DISK_BYTES), ring_bytes=64 << 20) as plant:
        site = Site(plant)
        try:
            site.start()
            yield site
        finally:
            site.close()


@contextmanager
def recovered(site: Site, position: Position, disk: int) -> Iterator[Path]:
    """The disk of then, mounted. It was frozen: its file system is clean, without a log to replay."""
    image = site.plant.recover(position, disk)
    try:
        assert "needs_recovery" not in run(["dumpe2fs", "-h", str(image)])
        filesystem.fsck("ext4", image)
        loop = LoopDisk(image, None)
        mount = site.plant.work_dir / "then" / str(disk)
        try:
            site.plant.namespace.mount(loop.device, mount)
            try:
                yield mount
            finally:
                site.plant.namespace.unmount(mount)
        finally:
            loop.close()
    finally:
        image.unlink(missing_ok=True)


def test_both_databases_start_from_the_bookmark_with_all_that_was_committed(site: Site) -> None:
    plant = site.plant
    with site.load() as (rows, maria):
        before = (rows.acked, maria.acked)
        made = site.bookmark("under-load")
        after = (rows.acked + 1, maria.acked + 1)
        wait_until(lambda: rows.acked > after[0] + 50 and maria.acked > after[1] + 50, 30, "load after the thaw")
        longest_s = max(rows.longest_s, maria.longest_s)
    print(made.hooks, f"longest commit {longest_s:.2f} s")
    assert made.consistency == "application"
    assert longest_s < FREEZE_S
    position = Position.parse(made.position)
    assert position in plant.recovery_points()

    with recovered(site, position, 0) as mount:
        then = PostgresInstance("postgres-then", plant.namespace, mount, mount, plant.work_dir, plant.log_dir)
        then.adopt()
        try:
            then.start()
            run([*then.client("pg_amcheck"), "--heapallindexed", "--install-missing"], deadline_s=60)
            count, highest = then.psql("select count(*), max(id) from rows").split("|")
            then.stop()
        finally:
            then.close()
        assert count == highest and before[0] <= int(count) <= after[0], (before, count, highest, after)
        _check_redo((plant.log_dir / "postgres-then.log").read_text(), made.hooks)

    with recovered(site, position, 1) as mount:
        again = MariadbInstance("mariadb-then", plant.namespace, mount, plant.work_dir, plant.log_dir)
        try:
            again.start()
            for table in ("safe", "plain"):
                count, highest = again.sql(f"select count(*), max(id) from load_.{table}").split("\t")
                assert count == highest and before[1] <= int(count) <= after[1], (table, before, count, highest, after)
            # Not "1 client is using or hasn't closed the table properly", as after a crash.
            assert again.sql("check table load_.safe, load_.plain").splitlines() == [
                "load_.safe\tcheck\tstatus\tOK",
                "load_.plain\tcheck\tstatus\tOK",
            ]
            began = re.search(r"checkpoint LSN=(\d+)", again.log)
            ended = re.search(r"mariadb: commits are blocked, InnoDB log at (\d+)", made.hooks)
            assert ended and (began is None or int(ended[1]) - int(began[1]) < REDO_BYTES_MAX), again.log
        finally:
            again.close()


def _check_redo(log: str, hooks: str) -> None:
    """PostgreSQL replays from the hook's checkpoint on, and only what was written after it."""
    promised = re.search(r"postgresql: checkpoint, replay begins at (\S+)", hooks)
    assert promised is not None, hooks
    began = re.search(r"redo starts at (\S+)", log)
    if began is None:
        assert "redo is not required" in log, log
        return
    ended = re.search(r"redo done at (\S+)", log)
    assert ended is not None, log
    assert _lsn(promised[1]) <= _lsn(began[1]) <= _lsn(promised[1]) + 64, (promised[1], began[1])
    assert _lsn(ended[1]) - _lsn(began[1]) < REDO_BYTES_MAX


def _lsn(text: str) -> int:
    high, low = text.split("/")
    return int(high, 16) << 32 | int(low, 16)


def test_the_file_systems_of_the_protected_disks_are_found(site: Site) -> None:
    numbers = [disk.device.stat().st_rdev for disk in site.plant.disks]
    disks = {(os.major(number), os.minor(number)) for number in numbers}
    found = site.plant.namespace.run(
        [sys.executable, "-c", f"from cdp.agent.freezing import mounts_on; print(*mounts_on({disks}), sep='\\n')"]
    )
    assert found.split() == [str(mount) for mount in reversed(site.mounts)]


def test_from_the_machine_itself(site: Site) -> None:
    done = site.own("from-here", "--application", "--note", "deployment 7")
    out, err = done.communicate(timeout=60)
    assert done.returncode == 0, err
    made = msgspec.json.decode(out, type=wire.BookmarkInfo)
    assert (made.name, made.note, made.consistency) == ("from-here", "deployment 7", "application")
    again = site.own("from-here")
    assert (again.wait(60), "already" in again.communicate()[1]) == (1, True)
    plain = site.bookmark("plain", application=False)
    assert (plain.consistency, plain.hooks) == ("crash", "")
    assert Position.parse(plain.position) > Position.parse(made.position)


@pytest.mark.parametrize(
    ("trouble", "says"),
    [
        ("echo out of order; exit 7", "trouble ended with exit code 7: out of order"),
        ("cat >/dev/null", "was not frozen"),
    ],
    ids=["fails", "hangs"],
)
def test_no_bookmark_of_a_hook_that_fails(site: Site, trouble: str, says: str) -> None:
    site.trouble(trouble)
    with site.load() as (rows, maria):
        began = time.monotonic()
        with pytest.raises(CdpError, match=says) as raised:
            site.bookmark("failed")
        assert raised.value.code == "hook-failed" and raised.value.remedy
        assert time.monotonic() - began < FREEZE_S + 5
        seen = (rows.acked, maria.acked)
        wait_until(lambda: rows.acked > seen[0] and maria.acked > seen[1], 5, "commits")
        assert max(rows.longest_s, maria.longest_s) < FREEZE_S + 2
    site.trouble("true")
    assert "failed" not in site.bookmarks()
    assert site.touch().wait(5) == 0


@pytest.mark.parametrize("killed", ["nothing", "agent", "agent and guardian"])
def test_nothing_stays_frozen(site: Site, killed: str) -> None:
    """The agent is stopped in the very moment of the freeze: it will not thaw."""
    agent = site.plant.agent.pid
    site.trouble(f"kill -STOP {agent}")
    asking = site.own("never", "--application", "--timeout", "20")
    note = site.plant.work_dir / "run" / "frozen.json"
    wait_until(lambda: note.exists() or asking.poll() is not None, 30, "the freeze")
    assert asking.poll() is None, (asking.communicate(), site.plant.agent.log_tail())
    wait_until(lambda: "T (stopped)" in Path(f"/proc/{agent}/status").read_text(), 5, "the agent's stop")
    frozen = time.monotonic()
    touch = _blocked(site)
    site.trouble("true")
    if killed == "agent and guardian":
        for pid in _guardians(agent):
            os.kill(pid, signal.SIGKILL)
    if killed != "nothing":
        os.kill(agent, signal.SIGKILL)
    assert touch.wait(FREEZE_S + 5) == 0
    thawed_s = time.monotonic() - frozen
    print(f"{killed}: thawed after {thawed_s:.2f} s")
    assert thawed_s < FREEZE_S + 1
    if killed == "nothing":
        os.kill(agent, signal.SIGCONT)
    _, err = asking.communicate(timeout=60)
    if killed == "nothing":
        assert asking.returncode == 1 and "did not thaw within" in err, err
    wait_until(lambda: not note.exists(), 20, "the note's end")
    if asking.returncode != 0:
        assert "never" not in site.bookmarks()
    else:  # the server has repeated the order to the agent that came back
        site.plant.client.ask("DELETE", m.BOOKMARK.format(name=NAME, id="never"))
    assert site.bookmark(f"after {killed}").consistency == "application"


def _blocked(site: Site) -> subprocess.Popen[bytes]:
    """A program that waits for the file system to be thawed: tried until one does."""
    while True:
        touch = site.touch()
        try:
            touch.wait(0.2)
        except subprocess.TimeoutExpired:
            return touch


def _guardians(agent: int) -> list[int]:
    found = run(["pgrep", "-P", str(agent), "-f", "cdp.agent.guardian"]).split()
    return [int(pid) for pid in found]
