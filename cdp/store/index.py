"""The LMDB index: which rows exist, each with a checksum of its own.

LMDB keeps itself consistent over a crash, but it has no checksums: every row ends in 8 bytes of blake3 over key and
value, so that a flipped bit is found before anything is made of it.

The index is never allowed to run full while something acknowledged is still to be indexed: a reserve of its map and of
its disk blocks is kept back, and once that would be touched, new segments are refused (``StoreFull``).
"""

from __future__ import annotations

import errno
import threading
import uuid
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import lmdb
import msgspec
from blake3 import blake3

from cdp.store import tally
from cdp.store.errors import IndexDamaged, StoreFailed, StoreFormatUnknown, StoreFull
from cdp.store.files import reserve_blocks
from cdp.store.records import Entry, segment_key

FORMAT: Final = b"cdp store 3"
_OLD_RECORDS: Final = b"cdp store 2"
"""The format before: its records have sums of another kind (``record``), which stay as they are."""
_WITHOUT_TALLIES: Final = b"cdp store 1"
"""The one before that. It lacks the sums of ``tally``; the first start with this version adds them."""
TABLES: Final = (
    "meta",
    "machines",
    "names",
    "generations",
    "segments",
    "tallies",
    "times",
    "files",
    "tails",
    "bases",
    "cursors",
    "bookmarks",
    "rows",
    "audit",
)
SUM_BYTES: Final = 8
_READERS_MAX: Final = 512
"""Read transactions at once: worker threads of the server, with room to spare."""

_Row = TypeVar("_Row", bound=msgspec.Struct)


def row_sum(key: bytes, value: bytes) -> bytes:
    return bytes(blake3(key + value).digest(SUM_BYTES))


class Reader:
    """A snapshot of the index."""

    def __init__(self, txn: Any, tables: dict[str, Any]) -> None:
        self._txn = txn
        self._tables = tables

    def get(self, table: str, key: bytes) -> bytes | None:
        value = self._txn.get(key, db=self._tables[table])
        return None if value is None else _checked(table, key, value)

    def get_row(self, table: str, key: bytes, kind: type[_Row]) -> _Row | None:
        value = self.get(table, key)
        return None if value is None else msgspec.msgpack.decode(value, type=kind)

    def scan(self, table: str, start: bytes, prefix: bytes) -> Generator[tuple[bytes, bytes], None, None]:
        """Rows from ``start`` on, ascending, while the key begins with ``prefix``."""
        with self._txn.cursor(db=self._tables[table]) as cursor:
            if not cursor.set_range(start):
                return
            for key, value in cursor:
                if not key.startswith(prefix):
                    return
                yield key, _checked(table, key, value)

    def scan_back(self, table: str, before: bytes, prefix: bytes) -> Generator[tuple[bytes, bytes], None, None]:
        """Rows whose key is below ``before``, descending, while the key begins with ``prefix``."""
        with self._txn.cursor(db=self._tables[table]) as cursor:
            if not (cursor.prev() if cursor.set_range(before) else cursor.last()):
                return
            for key, value in cursor.iterprev():
                if not key.startswith(prefix):
                    return
                yield key, _checked(table, key, value)

    def rows_back(self, table: str, before: bytes, prefix: bytes, kind: type[_Row]) -> Iterator[_Row]:
        for _, value in self.scan_back(table, before, prefix):
            yield msgspec.msgpack.decode(value, type=kind)

    def segment(self, machine: uuid.UUID, generation: int, seq: int) -> Entry | None:
        value = self.get("segments", segment_key(machine, generation, seq))
        return None if value is None else Entry.unpack(value)

    def rows(self, table: str, prefix: bytes, kind: type[_Row]) -> Iterator[_Row]:
        for _, value in self.scan(table, prefix, prefix):
            yield msgspec.msgpack.decode(value, type=kind)


class Writer(Reader):
    """One atomic change of the index."""

    def put(self, table: str, key: bytes, value: bytes) -> None:
        self._txn.put(key, value + row_sum(key, value), db=self._tables[table])

    def put_row(self, table: str, key: bytes, row: msgspec.Struct) -> None:
        self.put(table, key, msgspec.msgpack.encode(row))

    def delete(self, table: str, key: bytes) -> bool:
        return bool(self._txn.delete(key, db=self._tables[table]))


class Index:
    def __init__(self, directory: Path, map_bytes: int) -> None:
        self._directory = directory
        self.map_bytes = map_bytes
        # At least so much of the map and of the disk is kept for indexing what has been acknowledged and for deleting.
        self.reserve_bytes = max(256 << 10, min(64 << 20, map_bytes // 8))
        self._write_lock = threading.RLock()
        directory.mkdir(mode=0o700, exist_ok=True)
        try:
            self._environment = lmdb.open(
                str(directory),
                map_size=map_bytes,
                max_dbs=len(TABLES),
                max_readers=_READERS_MAX,
                readahead=False,
                # The default, spelled out: without both syncs a power cut corrupts the index.
                sync=True,
                metasync=True,
                writemap=False,
            )
        except lmdb.Error as error:
            raise StoreFailed(
                f"The index cannot be opened: {error}.",
                remedy="Restore it from a copy, or check the disk and try again.",
            ) from error
        with _typed_errors():
            self._tables = {name: self._environment.open_db(name.encode()) for name in TABLES}
            self._check_format()

    def close(self) -> None:
        self._environment.close()

    @contextmanager
    def read(self) -> Iterator[Reader]:
        with _typed_errors(), self._environment.begin() as txn:
            yield Reader(txn, self._tables)

    @contextmanager
    def write(self) -> Iterator[Writer]:
        """Committed and durable when the block ends without an exception; otherwise nothing of it happened."""
        with self._write_lock, _typed_errors(), self._environment.begin(write=True) as txn:
            yield Writer(txn, self._tables)

    def used_bytes(self) -> int:
        """Bytes of the map that hold rows (pages waiting for reuse are not counted)."""
        with self._environment.begin() as txn:
            stats = [txn.stat(db) for db in self._tables.values()]
        pages = sum(stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"] for stat in stats)
        return int(pages * stats[0]["psize"])

    def check_room(self) -> None:
        """Raise ``StoreFull`` while the reserve is not intact."""
        used = self.used_bytes()
        if used + self.reserve_bytes > self.map_bytes:
            raise StoreFull(
                f"The index holds {used >> 10} KiB of at most {self.map_bytes >> 10} KiB.",
                remedy="Raise 'map_bytes' in the server's configuration and restart it, or shorten the retention.",
                used_bytes=used,
                map_bytes=self.map_bytes,
            )
        try:
            last_page = int(self._environment.info()["last_pgno"])
            page_bytes = int(self._environment.stat()["psize"])
            reserve_blocks(
                self._directory / "data.mdb", (last_page + 1) * page_bytes + min(self.reserve_bytes, 4 << 20)
            )
        except OSError as error:
            raise disk_error(error, "the index") from error

    def _check_format(self) -> None:
        with self.write() as txn:
            found = txn.get("meta", b"format")
            if found == _WITHOUT_TALLIES:
                tally.recount(txn)
            elif found not in (None, _OLD_RECORDS, FORMAT):
                raise StoreFormatUnknown(
                    f"The store has the format {found.decode(errors='replace')!r}, not {FORMAT.decode()!r}.",
                    remedy="Use the version of this program that wrote the store, or a newer one.",
                )
            if found != FORMAT:
                txn.put("meta", b"format", FORMAT)


def _checked(table: str, key: bytes, stored: bytes) -> bytes:
    value = stored[:-SUM_BYTES]
    if row_sum(key, value) != stored[-SUM_BYTES:]:
        raise IndexDamaged(
            f"A row of the index table {table!r} does not match its checksum.",
            remedy="Check the disk and the memory of this host, then restore the index from a copy.",
            table=table,
            key=key.hex(),
        )
    return value


@contextmanager
def _typed_errors() -> Iterator[None]:
    try:
        yield
    except (lmdb.MapFullError, lmdb.TxnFullError) as error:
        raise StoreFull(
            "The index is full.",
            remedy="Raise 'map_bytes' in the server's configuration and restart it, or shorten the retention.",
        ) from error
    except lmdb.Error as error:
        if "No space left" in str(error) or "quota" in str(error):
            raise disk_error(OSError(errno.ENOSPC, str(error)), "the index") from error
        raise StoreFailed(
            f"The index cannot be read or written: {error}.",
            remedy="Check the disk, then restart the server; nothing that was acknowledged is lost.",
        ) from error


def disk_error(error: OSError, what: str) -> StoreFull | StoreFailed:
    """The typed error for an ``OSError`` while writing ``what``."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StoreFull(
            f"There is no room on the disk for {what}.",
            remedy="Free space on the store's filesystem, shorten the retention, or move the store to a larger disk.",
        )
    return StoreFailed(
        f"Writing {what} failed: {error.strerror or error}.",
        remedy="Check the store's disk; the segment was not acknowledged and will be sent again.",
    )
