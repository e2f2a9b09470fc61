"""Small durable facts: cursors, bookmarks, takeover records, credentials, tokens, settings, the audit log."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Final

import msgspec

from cdp.store.amounts import Amounts
from cdp.store.errors import BookmarkExists, UnknownBookmark
from cdp.store.index import Index
from cdp.store.machines import unknown_position
from cdp.store.records import AuditEntry, Bookmark, Consistency, Cursor
from journal.position import Position

NAME_BYTES_MAX: Final = 200
VALUE_BYTES_MAX: Final = 1 << 20
"""A row that is larger than this is not a record but data, and belongs elsewhere."""
AUDIT_ENTRIES_MAX: Final = 100_000
"""The oldest entries go first."""
HOOKS_CHARS_MAX: Final = 16 << 10
"""What is kept of the output of a bookmark's hooks: its end."""
EXPIRED_BOOKMARKS_MAX: Final = 100
"""Of each machine; those that expired first go first."""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of bytes by name; each change is durable on return. Secrets are put in hashed, by the caller."""

    index: Index
    name: str

    def put(self, key: str, value: bytes) -> None:
        if len(value) > VALUE_BYTES_MAX:
            raise ValueError(f"a row of {self.name} has at most {VALUE_BYTES_MAX} bytes, not {len(value)}")
        with self.index.write() as txn:
            txn.put("rows", self._key(key), value)

    def get(self, key: str) -> bytes | None:
        with self.index.read() as txn:
            return txn.get("rows", self._key(key))

    def take(self, key: str) -> bytes | None:
        """Get and delete in one step: of several callers at once, one gets the row and the others None."""
        with self.index.write() as txn:
            value = txn.get("rows", self._key(key))
            if value is not None:
                txn.delete("rows", self._key(key))
        return value

    def delete(self, key: str) -> bool:
        with self.index.write() as txn:
            return txn.delete("rows", self._key(key))

    def items(self) -> dict[str, bytes]:
        prefix = self.name.encode() + b"\0"
        with self.index.read() as txn:
            return {key[len(prefix) :].decode(): value for key, value in txn.scan("rows", prefix, prefix)}

    def _key(self, key: str) -> bytes:
        return self.name.encode() + b"\0" + _name(key)


class Ledger(Amounts):
    @property
    def takeovers(self) -> Table:
        return Table(self.index, "takeovers")

    @property
    def credentials(self) -> Table:
        return Table(self.index, "credentials")

    @property
    def tokens(self) -> Table:
        return Table(self.index, "tokens")

    @property
    def settings(self) -> Table:
        """Whatever the server keeps per machine or for itself, such as machine specifications."""
        return Table(self.index, "settings")

    def save_takeover(self, takeover: str, record: bytes) -> None:
        self.takeovers.put(takeover, record)

    def load_takeovers(self) -> dict[str, bytes]:
        return self.takeovers.items()

    def remove_takeover(self, takeover: str) -> None:
        self.takeovers.delete(takeover)

    def set_cursor(self, machine: uuid.UUID, consumer: str, position: Position) -> None:
        """Durable on return. Raises ``UnknownPosition`` for one that is not stored."""
        state = self.state(machine)
        row = Cursor(consumer=consumer, position=str(position), set_at_ns=self.clock_ns())
        with self.index.write() as txn:
            # Inside: retention either sees the cursor, or has gone past it already.
            if not self.is_stored(state, position):
                raise unknown_position(machine, position)
            txn.put_row("cursors", machine.bytes + _name(consumer), row)

    def cursor(self, machine: uuid.UUID, consumer: str) -> Position | None:
        with self.index.read() as txn:
            row = txn.get_row("cursors", machine.bytes + _name(consumer), Cursor)
        return None if row is None else Position.parse(row.position)

    def cursors(self, machine: uuid.UUID) -> list[Cursor]:
        with self.index.read() as txn:
            return list(txn.rows("cursors", machine.bytes, Cursor))

    def remove_cursor(self, machine: uuid.UUID, consumer: str) -> bool:
        """The consumer is gone: retention need not wait for it any more."""
        with self.index.write() as txn:
            return txn.delete("cursors", machine.bytes + _name(consumer))

    def add_bookmark(
        self,
        machine: uuid.UUID,
        name: str,
        position: Position,
        note: str = "",
        *,
        hold: bool = False,
        consistency: Consistency = "crash",
        hooks: str = "",
    ) -> Bookmark:
        """Name a recovery point. An expired bookmark gives its name away. Raises ``BookmarkExists``,
        ``UnknownPosition``."""
        if not self.is_recovery_point(machine, position):
            raise unknown_position(machine, position)
        base = self.state(machine).base  # the oldest recovery point; its segment may be folded
        is_base = base is not None and base.target_position == position
        row = Bookmark(
            name=name,
            position=str(position),
            sealed_at_ns=base.sealed_at_ns if base and is_base else self.header(machine, position).sealed_at_ns,
            created_at_ns=self.clock_ns(),
            note=note,
            consistent=consistency == "application",
            hold=hold,
            hooks=hooks[-HOOKS_CHARS_MAX:],
        )
        key = machine.bytes + _name(name)
        with self.index.write() as txn:
            known = txn.get_row("bookmarks", key, Bookmark)
            if known is not None and known.expired_at_ns is None:
                raise BookmarkExists(
                    f"There is a bookmark {name!r} already.",
                    remedy="Choose another name, or remove it first.",
                    name=name,
                )
            if not self.is_stored(self.state(machine), position):
                raise unknown_position(machine, position)  # retention has folded it meanwhile
            txn.put_row("bookmarks", key, row)
        return row

    def hold_bookmark(self, machine: uuid.UUID, name: str, hold: bool) -> Bookmark:
        """Let retention stop at the bookmark, or go past it again. Raises ``UnknownBookmark``."""
        key = machine.bytes + _name(name)
        with self.index.write() as txn:
            row = txn.get_row("bookmarks", key, Bookmark)
            if row is None or row.expired_at_ns is not None:
                raise UnknownBookmark(
                    f"There is no bookmark {name!r}, or it has expired.", remedy="'cdp points' lists them.", name=name
                )
            row = msgspec.structs.replace(row, hold=hold)
            txn.put_row("bookmarks", key, row)
        return row

    def expire_bookmarks(self, machine: uuid.UUID) -> list[Bookmark]:
        """Mark those whose recovery point is not stored any more; returns them. Expired ones stay listed, up to
        ``EXPIRED_BOOKMARKS_MAX``."""
        state = self.state(machine)
        now_ns = self.clock_ns()
        with self.index.write() as txn:
            rows = list(txn.rows("bookmarks", machine.bytes, Bookmark))
            gone = [
                msgspec.structs.replace(row, expired_at_ns=now_ns)
                for row in rows
                if row.expired_at_ns is None and not self.is_stored(state, Position.parse(row.position))
            ]
            for row in gone:
                txn.put_row("bookmarks", machine.bytes + row.name.encode(), row)
            expired = sorted((row.expired_at_ns, row.name) for row in [*rows, *gone] if row.expired_at_ns is not None)
            for _, name in expired[:-EXPIRED_BOOKMARKS_MAX]:
                txn.delete("bookmarks", machine.bytes + name.encode())
        return gone

    def bookmark(self, machine: uuid.UUID, name: str) -> Bookmark:
        with self.index.read() as txn:
            row = txn.get_row("bookmarks", machine.bytes + _name(name), Bookmark)
        if row is None:
            raise UnknownBookmark(f"There is no bookmark {name!r}.", remedy="'cdp points' lists them.", name=name)
        return row

    def bookmarks(self, machine: uuid.UUID) -> list[Bookmark]:
        """By name, expired ones too."""
        with self.index.read() as txn:
            return list(txn.rows("bookmarks", machine.bytes, Bookmark))

    def remove_bookmark(self, machine: uuid.UUID, name: str) -> None:
        with self.index.write() as txn:
            if not txn.delete("bookmarks", machine.bytes + _name(name)):
                raise UnknownBookmark(f"There is no bookmark {name!r}.", remedy="'cdp points' lists them.", name=name)

    def audit(self, actor: str, action: str, subject: str, details: dict[str, str] | None = None) -> AuditEntry:
        """Who did what to whom; durable on return."""
        with self.index.write() as txn:
            last = next((key for key, _ in txn.scan_back("audit", b"\xff" * 9, b"")), None)
            number = 1 if last is None else int.from_bytes(last, "big") + 1
            entry = AuditEntry(
                number=number, at_ns=self.clock_ns(), actor=actor, action=action, subject=subject, details=details or {}
            )
            txn.put_row("audit", number.to_bytes(8, "big"), entry)
            if number > AUDIT_ENTRIES_MAX:
                txn.delete("audit", (number - AUDIT_ENTRIES_MAX).to_bytes(8, "big"))
        return entry

    def audit_log(self, limit: int = 1000) -> list[AuditEntry]:
        """The newest first."""
        with self.index.read() as txn:
            rows = txn.rows_back("audit", b"\xff" * 9, b"", AuditEntry)
            return [entry for entry, _ in zip(rows, range(limit), strict=False)]


def _name(name: str) -> bytes:
    raw = name.encode()
    if not 1 <= len(raw) <= NAME_BYTES_MAX or not name.isprintable():
        raise ValueError(f"a name has 1 to {NAME_BYTES_MAX} printable bytes")
    return raw
