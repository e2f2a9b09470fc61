"""Is the index sound? Read by a process of its own, because a damaged page may take its reader down with it.

    python -m cdp.store.check DIRECTORY       one line of JSON; DIRECTORY is the index, in use or not

LMDB has no checksums: a flipped bit in a row is found by the row's own sum, one in a branch page by rows that cannot be
found by their key, or are missing, or out of order. A page so broken that reading it ends the process is damage, too.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import lmdb
import msgspec

from cdp.store.index import SUM_BYTES, TABLES, row_sum
from journal.errors import CdpError

PROBLEMS_MAX: Final = 100
_DEADLINE_S: Final = 1800.0


class CheckFailed(CdpError):
    """The index could not be checked, for another reason than damage."""

    code = "check-failed"


class IndexChecked(msgspec.Struct, kw_only=True):
    rows: int
    problems: list[str]


def check_index(directory: Path) -> IndexChecked:
    """Read every row. Raises ``CheckFailed`` if it could not be read at all for another reason than damage."""
    command = [sys.executable, "-m", "cdp.store.check", str(directory)]
    try:
        done = subprocess.run(command, capture_output=True, check=False, timeout=_DEADLINE_S)
    except subprocess.TimeoutExpired:
        return IndexChecked(rows=0, problems=["The index could not be read to its end: its pages lead in circles."])
    if done.returncode < 0:
        return IndexChecked(
            rows=0, problems=[f"The index is so damaged that signal {-done.returncode} ended its reader."]
        )
    try:
        return msgspec.json.decode(done.stdout, type=IndexChecked)
    except msgspec.DecodeError:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise CheckFailed(
            f"The index could not be checked: {''.join(last)}.", remedy="Check the path and the installation."
        ) from None


def _check(directory: Path) -> IndexChecked:
    found = IndexChecked(rows=0, problems=[])
    try:
        environment = lmdb.open(str(directory), readonly=True, create=False, max_dbs=len(TABLES), readahead=False)
    except lmdb.Error as error:
        found.problems.append(f"The index cannot be opened: {error}.")
        return found
    with environment:
        for table in TABLES:
            try:
                for problem in _table(environment, table, found):
                    found.problems.append(problem)
                    if len(found.problems) >= PROBLEMS_MAX:
                        return found
            except (lmdb.Error, UnicodeDecodeError) as error:
                found.problems.append(f"Table {table!r} cannot be read: {error}.")
    return found


def _table(environment: Any, table: str, found: IndexChecked) -> Iterator[str]:
    try:
        database = environment.open_db(table.encode(), create=False)
    except lmdb.NotFoundError:
        return  # a table that a later version adds
    with environment.begin(db=database, buffers=False) as txn:
        rows = 0
        last = b""
        with txn.cursor() as cursor:
            for key, value in cursor:
                rows += 1
                if rows > 1 and key <= last:
                    yield f"Table {table!r}: the row {key.hex()} is out of order."
                if value[-SUM_BYTES:] != row_sum(key, value[:-SUM_BYTES]):
                    yield f"Table {table!r}: the row {key.hex()} does not match its checksum."
                if txn.get(key) != value:
                    yield f"Table {table!r}: the row {key.hex()} cannot be found by its key."
                last = key
        if rows != txn.stat(database)["entries"]:
            yield f"Table {table!r} has {rows} rows, not {txn.stat(database)['entries']}."
        found.rows += rows


if __name__ == "__main__":
    sys.stdout.buffer.write(msgspec.json.encode(_check(Path(sys.argv[1]))))
