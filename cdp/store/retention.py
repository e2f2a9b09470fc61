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

import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from itertools import islice
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from cdp.store import tally
from cdp.store.base import BATCH_CHUNKS, CHUNK_BYTES, BaseImage
from cdp.store.errors import StoredDamage, StoreFull
from cdp.store.files import remove_tree
from cdp.store.horizon import NOTHING, Held, Retained, Step, held_back, holds_of, leads_to, walk
from cdp.store.imaging import Imaging
from cdp.store.index import Reader, disk_error
from cdp.store.records import Base, Bookmark, Cursor, Entry, Span, generation_key, segment_key, time_key
from cdp.store.resolve import BASE, Pieces, Row
from cdp.store.stamp import read_stamp, write_stamp
from cdp.store.state import MachineState
from journal.extent import Kind
from journal.position import Position

_REMOVE_BATCH: Final = 256
"""Rows per commit: how long the removal keeps ingest waiting."""

Pause = Callable[[float], bool]
"""Called between two batches of a fold with the seconds that the last one took. It may wait, so that others get the
disk; True: end here, the next call goes on."""


class _Paused(Exception):
    """``Pause`` said to end."""


class Retention(Imaging):
    def retain(
        self,
        machine: uuid.UUID,
        *,
        keep_ns: int | None = None,
        keep_bytes: int | None = None,
        now_ns: int | None = None,
        past: Collection[str] = (),
        pause: Pause = lambda _: False,
    ) -> Retained:
        """Fold one step of what is older than ``keep_ns`` before ``now_ns`` (default: the clock), and of what goes
        beyond ``keep_bytes`` of segment files. None: no such limit.

        Never past a held bookmark or an open reader, nor past the cursor of a consumer on the live history, unless the
        consumer is named in ``past``. Raises ``StoreFull``, ``StoreFailed``, ``StoredDamage``; nothing is lost then,
        and the next call goes on.
        """
        state = self.state(machine)
        with state.folding:
            try:
                damage = self._finish_damaged(state, pause)
                before = self.pool.bytes_of(machine)
                oldest_ns = (self.clock_ns() if now_ns is None else now_ns) - keep_ns if keep_ns is not None else None
                excess_bytes = 0 if keep_bytes is None else max(0, before - keep_bytes)
                step = self._step(state, oldest_ns, excess_bytes, past)
                if damage is not None and not step.points:
                    raise damage
                if not step.points or pause(0.0):
                    return msgspec.structs.replace(NOTHING, held_by=step.held_by)
                target, fits = self._that_fits(state, step)
                held = self._aim(state, target, past)
                if held is not None:
                    return msgspec.structs.replace(NOTHING, held_by=held)
                segments = self._finish_fold(state, pause)
            except _Paused:
                return msgspec.structs.replace(NOTHING, more=True)
            return Retained(
                folded_to=str(target.header.position),
                segments=segments,
                freed_bytes=before - self.pool.bytes_of(machine),
                held_by=step.held_by,
                more=step.more or not fits,
            )

    def finish_fold(self, state: MachineState) -> int:
        """Do what is left of the last fold; returns how many segments were removed."""
        with state.folding:
            return self._finish_fold(state, lambda _: False)

    def _finish_fold(self, state: MachineState, pause: Pause) -> int:
        base = state.base
        if base is None:
            return 0
        if base.folded != base.target:
            try:
                self._stamp(state, base)
                self._fold(state, base, pause)
            except OSError as error:
                raise disk_error(error, "the base image") from error
            done = msgspec.structs.replace(base, folded=base.target)
            with self.index.write() as txn:
                txn.put_row("bases", state.machine.uuid.bytes, done)
            with state.lock:
                state.base = base = done
        try:
            self._stamp(state, base)
        except OSError as error:
            raise disk_error(error, "the base image") from error
        return self._remove(state)

    def _finish_damaged(self, state: MachineState, pause: Pause) -> StoredDamage | None:
        """As ``_finish_fold``. A target that needs what is damaged is never reached; a later one, for which all of it
        was written anew, may be."""
        try:
            self._finish_fold(state, pause)
        except StoredDamage as error:
            return error
        return None

    def _stamp(self, state: MachineState, base: Base) -> None:
        directory = self.base_directory(state.machine.uuid, base.root)
        if read_stamp(self.files, directory) != base:
            write_stamp(self.files, directory, base)

    def _step(self, state: MachineState, oldest_ns: int | None, excess_bytes: int, past: Collection[str]) -> Step:
        with state.lock:
            spans = state.held(state.timeline())
        with closing(self._entries(state, spans, self._pending(state))) as entries:
            step = walk(entries, oldest_ns, excess_bytes)
        if not step.points:
            return step
        with self.index.read() as txn:
            return held_back(step, state, self._holds(txn, state, past))

    def _holds(self, txn: Reader, state: MachineState, past: Collection[str]) -> list[Held]:
        machine = state.machine.uuid
        cursors = [row for row in txn.rows("cursors", machine.bytes, Cursor) if row.consumer not in past]
        cursors = [row for row in cursors if self.contains(machine, Position.parse(row.position))]
        return holds_of(cursors, txn.rows("bookmarks", machine.bytes, Bookmark))

    def _that_fits(self, state: MachineState, step: Step) -> tuple[Entry, bool]:
        """The furthest of the step's points for which the disk has room, and whether that is the last one. Raises
        ``StoreFull``."""
        free, reserve = self.pool.room()
        room = free - reserve // 4  # the index and the runs grow as well
        points = step.points
        growth = 0
        while points:
            # Looking is dear, and most of the time there is room for all.
            growth = step.growth_bytes_max
            if growth > room:
                growth = self._growth_bytes(state, points[-1].header.position)
            if growth <= room:
                return points[-1], points[-1] is step.points[-1]
            points = points[: len(points) // 2]
        raise StoreFull(
            f"Folding the oldest seconds of the journal adds {growth >> 20} MiB to the base image; the disk has "
            f"{max(0, room) >> 20} MiB for that.",
            remedy="Free space on the store's filesystem, or move the store to a larger disk.",
            growth_bytes=growth,
            room_bytes=room,
        )

    def _growth_bytes(self, state: MachineState, target: Position) -> int:
        """What the files of the base image grow by when it is folded to ``target``."""
        machine = state.machine.uuid
        image = self.base(machine, state.root(target))
        with state.lock:
            spans = state.unfolded(state.lineage(target))
        versions = self.versions(machine)
        versions.catch_up(spans)
        chunks = 0
        for disk in self.machine(machine).disks:
            holes = [
                (offset, offset + length)
                for offset, length, is_hole in image.extents(disk.index, 0, disk.size_bytes)
                if is_hole
            ]
            bounds = -(-np.array(holes, np.int64).reshape(-1, 2) // CHUNK_BYTES)
            last = -1
            for pieces in versions.pieces(spans, disk.index, 0, disk.size_bytes):
                numbers = _chunks_of(pieces)
                numbers = numbers[numbers > last]  # windows may meet inside a chunk
                if len(numbers) and len(bounds):
                    last = int(numbers[-1])
                    hole = np.searchsorted(bounds[:, 0], numbers, "right") - 1
                    chunks += int(((hole >= 0) & (numbers < bounds[hole, 1])).sum())
        return chunks * CHUNK_BYTES

    def _aim(self, state: MachineState, target: Entry, past: Collection[str]) -> Held | None:
        """Commit that the base image goes to ``target``. Returns who has come to need an older position since the step
        was planned, if anybody has."""
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
            try:
                # Inside of one transaction: who stores a cursor or a bookmark meanwhile either is seen here, or is told
                # that the position is not there any more.
                with self.index.write() as txn:
                    behind = (h for h in self._holds(txn, state, past) if not leads_to(state, position, h.at))
                    held = next(behind, None)
                    pinned = self.set_base(state, base) if held is None else None
                    if pinned is not None:
                        held = Held(kind="reader", name="", position=str(pinned))
                    if held is None:
                        txn.put_row("bases", state.machine.uuid.bytes, base)
            except BaseException:
                with state.lock:
                    state.base = old
                raise
        return held

    def _fold(self, state: MachineState, base: Base, pause: Pause) -> None:
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
                for row in pieces.rows()
                if row[2] != BASE
            )
            for batch in batches(rows):
                began = time.monotonic()
                self._fold_batch(image, machine, disk.index, batch)
                # At once: a sync of everything at the end would keep the syncs of ingest waiting.
                image.sync(disk.index)
                if pause(time.monotonic() - began):
                    raise _Paused

    def _fold_batch(self, image: BaseImage, machine: uuid.UUID, disk: int, batch: list[Row]) -> None:
        contents = [memoryview(bytearray(row[1])) if row[2] == Kind.DATA else None for row in batch]
        wanted: dict[tuple[int, int], list[tuple[int, memoryview]]] = {}
        for (*_, generation, seq, payload_offset), content in zip(batch, contents, strict=True):
            if content is not None:
                wanted.setdefault((generation, seq), []).append((payload_offset, content))
        for (generation, seq), parts in wanted.items():
            self.frames.read_parts(parts, (machine, generation, seq))
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


def batches(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """Cut ascending rows into batches that touch at most ``BATCH_CHUNKS`` chunks each, whole chunks only. What lies
    between does not count: each batch costs two syncs, and writes all over a large disk are the usual case."""
    batch: list[Row] = []
    last, left = -1, BATCH_CHUNKS
    for offset, length, *rest in rows:
        done = 0
        while done < length:
            first = (offset + done) // CHUNK_BYTES
            if first > last and not left:
                yield batch
                batch, left = [], BATCH_CHUNKS
            before = max(last, first - 1)  # the last chunk that this piece does not add
            take = min(length - done, (before + left + 1) * CHUNK_BYTES - offset - done)
            kind, generation, seq, payload_offset = rest
            batch.append((offset + done, take, kind, generation, seq, payload_offset + done))
            done += take
            last = (offset + done - 1) // CHUNK_BYTES
            left -= last - before
    if batch:
        yield batch


def _chunks_of(pieces: Pieces) -> npt.NDArray[np.int64]:
    """The chunks that the data among ``pieces`` touches, ascending."""
    data = pieces.kinds == Kind.DATA
    first = pieces.offsets[data] // CHUNK_BYTES
    count = (pieces.offsets[data] + pieces.lengths[data] - 1) // CHUNK_BYTES - first + 1
    starts = np.cumsum(count) - count
    return np.unique(np.repeat(first - starts, count) + np.arange(int(count.sum())))
