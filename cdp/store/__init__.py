"""The CDP store: every second of every machine, durable before it is acknowledged.

Synchronous and thread-safe; a server calls it from worker threads. One process has a store open at a time.

    from cdp.store import ImageReader, Store, recover

    store = Store.open(directory)                                   # or: with Store.open(directory) as store
    machine = store.create_machine("db1", [DiskInfo(...)])          # -> Machine(uuid, name, disks, created_at_ns)
    store.machine("db1"), store.machine(uuid), store.list_machines(), store.rename_machine(uuid, name)
    store.update_disks(uuid, disks), store.remove_machine(uuid)

    store.start_generation(uuid, parent, reason) -> Position        # genesis; durable on return; fences the one before
    store.live(uuid) -> Position                                    # tip of the live generation (maybe its genesis)
    store.live_header(uuid) -> Header | None                        # header of the tip, None at a genesis
    store.generations(uuid) -> list[Generation]                     # number, parent, reason, started_at_ns

    store.put_segment(uuid, raw) -> (Position, duplicate)           # durable on return
    store.headers_after(uuid, position, limit) -> list[Header]      # along the live lineage; UnknownPosition: seed anew
    store.read_segment(uuid, position) -> bytes                     # digest checked on every read
    store.header(uuid, position) -> Header                          # of any stored segment
    store.contains(uuid, position) -> bool                          # is it on the live lineage?

    store.last_recovery_point(uuid) -> Position | None
    store.recovery_points(uuid, start_ns, end_ns) -> History        # points and fuzzy intervals, oldest first
    store.position_at(uuid, time_ns) -> Position                    # NoRecoveryPoint names the nearest ones
    store.backlog_bytes(uuid, position) -> (segments, bytes)        # stored after a position, for lag by bytes
    store.usage(uuid) -> Usage                                      # segments, bytes, oldest and newest time

    store.set_cursor(uuid, consumer, position), store.cursor(uuid, consumer), store.cursors(uuid)
    store.remove_cursor(uuid, consumer)
    store.add_bookmark(uuid, name, position, note, hold=, consistency=, hooks=), store.hold_bookmark(uuid, name, hold)
    store.bookmark(uuid, name), store.bookmarks(uuid), store.remove_bookmark(uuid, name)
    store.save_takeover(id, bytes), store.load_takeovers() -> dict[str, bytes], store.remove_takeover(id)
    store.credentials, store.tokens, store.settings: Table          # put, get, take (once), delete, items
    store.audit(actor, action, subject, details), store.audit_log(limit)

    with ImageReader(store, uuid, position) as image:               # any stored position, fuzzy ones too
        image.read(disk, offset, length) -> bytes
        image.extents(disk, offset, length) -> [(offset, length, is_hole)]
        image.image_segment(disk, offset, length) -> bytes          # wire.IMAGE
        image.hashes(disk, offset, length, chunk) -> bytes          # wire.HASHES
    store.retain(uuid, keep_ns=, keep_bytes=) -> Retained           # one step of folding; call while ``more``
    verify(store, uuid) -> Verified                                 # reads everything; Verifier paces itself
    recover(store, uuid, disk, position, out_path, format="raw" | "qcow2", progress=callback)

Errors are in ``cdp.store.errors`` and ``journal.errors``. How the store survives a crash at each step is told in
``docs/durability.md``.
"""

from cdp.store.image import ImageReader
from cdp.store.records import Bookmark, Cursor, FuzzyInterval, Generation, History, Machine, RecoveryPoint, Usage
from cdp.store.recover import recover
from cdp.store.store import Store
from cdp.store.verify import Damage, Verified, Verifier, verify

__all__ = [
    "Bookmark",
    "Cursor",
    "Damage",
    "FuzzyInterval",
    "Generation",
    "History",
    "ImageReader",
    "Machine",
    "RecoveryPoint",
    "Store",
    "Usage",
    "Verified",
    "Verifier",
    "recover",
    "verify",
]
