"""Retention: segments that are older than what is to be kept become part of the base image.

    step                          crash after it
    ───────────────────────────   ────────────────────────────────────────────────────────────────────────────────────
    target chosen, committed      older points are not offered any more; the fold starts again at the next start
    writes laid over the base     the same; folding twice changes nothing (see ``base``)
    base synced                   the same
    "folded up to" committed      the segments are not needed any more; their removal goes on at the next start
    rows removed, files spare     done

Images at the target and later are right all the while: until "folded up to" is committed they are read from the
segments wherever the fold writes.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Final

import msgspec

from cdp.store import tally
from cdp.store.base import BATCH_CHUNKS, CHUNK_BYTES, BaseImage
from cdp.store.files import remove_tree
from cdp.store.imaging import Imaging
from cdp.store.index import disk_error
from cdp.store.records import Base, Cursor, Entry, Span, generation_key, segment_key, time_key
from cdp.store.resolve import BASE
from cdp.store.state import MachineState
from journal.extent import Kind
from journal.position import Position

STEP_SEGMENTS_MAX: Final = 3600
STEP_BYTES_MAX: Final = 1 << 30
"""One fold: bounds what a start after a crash has to do again."""
_REMOVE_BATCH: Final = 1024
"""Rows per commit: how long the removal keeps ingest waiting."""


_Row = tuple[int, int, int, int, int, int]
"""Offset, length, kind, generation, seq, payload offset."""


class Retained(msgspec.Struct, frozen=True, kw_only=True):
    """``held_by``: the consumer or reader without which more would have been folded. ``more``: call again."""

    folded_to: str | None
    segments: int
    freed_bytes: int
    held_by: str | None
    more: bool


@dataclass(frozen=True, slots=True)
class _Plan:
    target: Entry | None
    held_by: str | None
    more: bool


class Retention(Imaging):
    def retain(
        self,
        machine: uuid.UUID,
        *,
        keep_ns: int | None = None,
        keep_bytes: int | None = None,
        now_ns: int | None = None,
        ignore_cursors: bool = False,
        stop: Callable[[], bool] = lambda: False,
    ) -> Retained:
        """Fold one step of what is older than ``keep_ns`` before ``now_ns`` (default: the clock), and of what goes
        beyond ``keep_bytes`` of segment files. None: no such limit.

        Never past the cursor of a consumer on the live history unless ``ignore_cursors``, never past an open reader.
        One call per machine at a time. Raises ``StoreFull``, ``StoreFailed``, ``StoredDamage``; nothing is lost then,
        and the next call goes on.
        """
        state = self.state(machine)
        self.finish_fold(state)
        before = self.pool.bytes_of(machine)
        oldest_ns = (self.clock_ns() if now_ns is None else now_ns) - keep_ns if keep_ns is not None else None
        plan = self._plan(state, oldest_ns, 0 if keep_bytes is None else max(0, before - keep_bytes), ignore_cursors)
        if plan.target is None or stop():
            return Retained(folded_to=None, segments=0, freed_bytes=0, held_by=plan.held_by, more=False)
        held_by = self._aim(state, plan.target)
        if held_by is not None:
            return Retained(folded_to=None, segments=0, freed_bytes=0, held_by=held_by, more=False)
        segments = self.finish_fold(state)
        return Retained(
            folded_to=str(plan.target.header.position),
            segments=segments,
            freed_bytes=before - self.pool.bytes_of(machine),
            held_by=plan.held_by,
            more=plan.more,
        )

    def finish_fold(self, state: MachineState) -> int:
        """Do what is left of the last fold; returns how many segments were removed."""
        base = state.base
        if base is None:
            return 0
        if base.folded != base.target:
            try:
                self._fold(state, base)
            except OSError as error:
                raise disk_error(error, "the base image") from error
            done = msgspec.structs.replace(base, folded=base.target)
            with self.index.write() as txn:
                txn.put_row("bases", state.machine.uuid.bytes, done)
            with state.lock:
                state.base = done
        return self._remove(state)

    def _plan(self, state: MachineState, oldest_ns: int | None, excess_bytes: int, ignore_cursors: bool) -> _Plan:
        """Walk from the oldest stored segment as far as retention wants and one step allows."""
        with state.lock:
            spans = state.held(state.timeline())
        points: list[Entry] = []
        walked_bytes = 0
        more = False
        with closing(self._entries(state, spans, self._pending(state))) as entries:
            for number, entry in enumerate(entries):
                expired = oldest_ns is not None and entry.header.sealed_at_ns <= oldest_ns
                if not expired and walked_bytes >= excess_bytes:
                    break
                if points and (number >= STEP_SEGMENTS_MAX or walked_bytes >= STEP_BYTES_MAX):
                    more = True
                    break
                walked_bytes += entry.record_bytes
                if entry.header.is_recovery_point:
                    points.append(entry)
        if ignore_cursors or not points:
            return _Plan(points[-1] if points else None, None, more)
        with self.index.read() as txn:
            cursors = list(txn.rows("cursors", state.machine.uuid.bytes, Cursor))
        live = [cursor for cursor in cursors if self.contains(state.machine.uuid, Position.parse(cursor.position))]
        held_by: str | None = None
        while points:
            target = points[-1].header.position
            blocking = [c for c in live if not _leads_to(state, target, Position.parse(c.position))]
            if not blocking:
                return _Plan(points[-1], held_by, more and held_by is None)
            held_by = blocking[0].consumer
            points.pop()
        return _Plan(None, held_by, False)

    def _aim(self, state: MachineState, target: Entry) -> str | None:
        """Commit that the base image goes to ``target``. Returns who reads an older position, if anybody does."""
        position = target.header.position
        with state.writing:
            self.flush()
            root = state.root(position)
            old = state.base
            base = Base(
                folded=old.folded if old is not None and old.root == root else None,
                target=str(position),
                sealed_at_ns=target.header.sealed_at_ns,
                root=root,
            )
            pinned = self.set_base(state, base)
            if pinned is not None:
                return f"reader of {pinned.short}"
            try:
                with self.index.write() as txn:
                    txn.put_row("bases", state.machine.uuid.bytes, base)
            except BaseException:
                with state.lock:
                    state.base = old
                raise
        return None

    def _fold(self, state: MachineState, base: Base) -> None:
        machine = state.machine.uuid
        image = self.base(machine, base.root)
        with state.lock:
            spans = state.unfolded(state.lineage(base.target_position))
        versions = self.versions(machine)
        versions.catch_up(spans)
        for disk in self.machine(machine).disks:
            image.prepare(disk.index, disk.size_bytes)
            rows = (
                row
                for pieces in versions.pieces(spans, disk.index, 0, disk.size_bytes)
                for row in zip(
                    pieces.offsets.tolist(),
                    pieces.lengths.tolist(),
                    pieces.kinds.tolist(),
                    pieces.generations.tolist(),
                    pieces.seqs.tolist(),
                    pieces.payload_offsets.tolist(),
                    strict=True,
                )
                if row[2] != BASE
            )
            for batch in _batches(rows):
                self._fold_batch(image, machine, disk.index, batch)
            image.sync(disk.index)

    def _fold_batch(self, image: BaseImage, machine: uuid.UUID, disk: int, batch: list[_Row]) -> None:
        contents = [memoryview(bytearray(row[1])) if row[2] == Kind.DATA else None for row in batch]
        order = sorted(range(len(batch)), key=lambda number: batch[number][3:])
        for number in order:
            content = contents[number]
            if content is not None:
                _, _, _, generation, seq, payload_offset = batch[number]
                self.frames.read_into(content, (machine, generation, seq), payload_offset)
        image.fold(disk, [(row[0], row[1], content) for row, content in zip(batch, contents, strict=True)])

    def _remove(self, state: MachineState) -> int:
        """Delete every segment that is in the base image or leads nowhere."""
        machine = state.machine.uuid
        removed = 0
        for span in state.removable():
            while (count := self._remove_some(state, span)) > 0:
                removed += count
            self.versions(machine).forget(span.generation, span.last)
        if removed:
            for bookmark in self.expire_bookmarks(machine):
                details = {"bookmark": bookmark.name, "position": bookmark.position}
                self.audit("store", "bookmark expired", str(machine), details)
            self.pool.trim(self.index)
        assert state.base is not None
        for older in range(1, state.base.root):
            remove_tree(self.base_directory(machine, older))
        return removed

    def _remove_some(self, state: MachineState, span: Span) -> int:
        machine = state.machine.uuid
        # Nobody may roll to another file meanwhile: that changes the rows of the pool as well.
        with state.writing:
            with self.index.write() as txn:
                start = segment_key(machine, span.generation, span.first)
                rows = list(
                    islice(txn.scan("segments", start, generation_key(machine, span.generation)), _REMOVE_BATCH)
                )
                counts: dict[int, int] = {}
                gone: list[Entry] = []
                for key, value in rows:
                    entry = Entry.unpack(value)
                    if entry.header.seq > span.last:
                        break
                    txn.delete("segments", key)
                    txn.delete("times", time_key(machine, entry.header))
                    counts[entry.file] = counts.get(entry.file, 0) + 1
                    gone.append(entry)
                tally.removed(txn, machine, gone)
                changed = self.pool.removed(txn, counts)
            for row in changed:
                self.pool.committed(row)
        return len(gone)


def _batches(rows: Iterator[_Row]) -> Iterator[list[_Row]]:
    """Cut ascending rows into batches that touch at most ``BATCH_CHUNKS`` chunks each, whole chunks only."""
    batch: list[_Row] = []
    stop = 0
    for offset, length, *rest in rows:
        done = 0
        while done < length:
            if offset + done >= stop:
                if batch:
                    yield batch
                    batch = []
                stop = ((offset + done) // CHUNK_BYTES + BATCH_CHUNKS) * CHUNK_BYTES
            take = min(length - done, stop - offset - done)
            kind, generation, seq, payload_offset = rest
            batch.append((offset + done, take, kind, generation, seq, payload_offset + done))
            done += take
    if batch:
        yield batch


def _leads_to(state: MachineState, target: Position, position: Position) -> bool:
    lineage = state.lineage(position)
    return lineage[0].generation > state.root(target) or any(target in span for span in lineage)
