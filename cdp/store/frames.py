"""Parts of stored payloads: only the frames that are needed are read, checked and decompressed."""

from __future__ import annotations

import threading
import uuid
from collections import OrderedDict
from typing import Final

import zstandard

from cdp.store.errors import StoredDamage, StoreFailed, UnknownPosition
from cdp.store.ledger import Ledger
from cdp.store.record import Layout, read_layout
from journal.decoder import expand
from journal.errors import SegmentDamaged
from journal.segment import FRAME_BYTES

CACHE_FRAMES: Final = 512
"""32 MiB of decompressed payload, for all readers of a store together."""
CACHE_LAYOUTS: Final = 4096
"""An hour of them: some 10 MiB."""
_READ_BYTES: Final = 8 << 20
_Key = tuple[uuid.UUID, int, int]


class SegmentGone(UnknownPosition):
    """Retention has folded the segment since its place was looked up; the base image has what it wrote."""

    code = "segment-gone"


class Frames:
    """Thread-safe."""

    def __init__(self, store: Ledger) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._layouts: OrderedDict[_Key, Layout] = OrderedDict()
        self._frames: OrderedDict[tuple[_Key, int], bytes] = OrderedDict()
        self._local = threading.local()

    def read_into(self, out: memoryview, segment: _Key, offset: int) -> None:
        """Fill ``out`` with the payload of ``segment`` (machine, generation, seq) from ``offset`` on.

        Raises ``SegmentGone``, ``StoredDamage``, ``StoreFailed``.
        """
        frame, skip = divmod(offset, FRAME_BYTES)
        done = 0
        while done < len(out):
            content = self._cached(segment, frame)
            if content is None:
                content = self._load(segment, frame, -(-(skip + len(out) - done) // FRAME_BYTES))
            take = min(len(content) - skip, len(out) - done)
            out[done : done + take] = memoryview(content)[skip : skip + take]
            done += take
            frame, skip = frame + 1, 0

    def _load(self, segment: _Key, frame: int, count: int) -> bytes:
        """Read ``count`` frames at most, from ``frame`` on, into the cache; returns the first."""
        layout = self._layout(segment)
        last = min(frame + count, len(layout.starts) - 1)
        while last > frame + 1 and layout.starts[last] - layout.starts[frame] > _READ_BYTES:
            last = frame + max(1, (last - frame) // 2)
        try:
            handle = self._store.files.open(self._store.pool.path(layout.file))
            try:
                length = layout.starts[last] - layout.starts[frame]
                stored = memoryview(self._store.files.read(handle, length, layout.starts[frame]))
            finally:
                self._store.files.close(handle)
            contents = [self._content(layout, number, stored, layout.starts[frame]) for number in range(frame, last)]
        except (StoredDamage, OSError) as error:
            raise self._explained(segment, error) from error
        with self._lock:
            for number, content in enumerate(contents, frame):
                self._frames[segment, number] = content
            while len(self._frames) > CACHE_FRAMES:
                self._frames.popitem(last=False)
        return contents[0]

    def _content(self, layout: Layout, frame: int, stored: memoryview, start: int) -> bytes:
        piece = stored[layout.starts[frame] - start : layout.starts[frame + 1] - start]
        layout.check_frame(frame, piece)
        want = min(FRAME_BYTES, layout.header.payload_bytes - frame * FRAME_BYTES)
        if layout.raw[frame]:
            return bytes(piece)
        # A decompressor serves one thread only.
        decompressor = getattr(self._local, "decompressor", None)
        if decompressor is None:
            decompressor = self._local.decompressor = zstandard.ZstdDecompressor()
        try:
            return expand(decompressor, piece, want)
        except SegmentDamaged as error:
            raise StoredDamage(error.sentence, remedy=error.remedy) from error

    def _cached(self, segment: _Key, frame: int) -> bytes | None:
        with self._lock:
            content = self._frames.get((segment, frame))
            if content is not None:
                self._frames.move_to_end((segment, frame))
            return content

    def _layout(self, segment: _Key) -> Layout:
        with self._lock:
            layout = self._layouts.get(segment)
            if layout is not None:
                self._layouts.move_to_end(segment)
                return layout
        machine, generation, seq = segment
        entry = self._store.entry(self._store.state(machine), generation, seq)
        file = None if entry is None else self._store.pool.row(entry.file)
        if entry is None or file is None:
            raise _gone(segment)
        try:
            layout = read_layout(self._store.files, self._store.pool.path(entry.file), file, entry)
        except (StoredDamage, OSError) as error:
            raise self._explained(segment, error) from error
        with self._lock:
            self._layouts[segment] = layout
            while len(self._layouts) > CACHE_LAYOUTS:
                self._layouts.popitem(last=False)
        return layout

    def _explained(self, segment: _Key, error: StoredDamage | OSError) -> StoredDamage | StoreFailed | SegmentGone:
        """Damage, or a file that retention has recycled under the reader?"""
        machine, generation, seq = segment
        with self._lock:
            self._layouts.pop(segment, None)
        if self._store.entry(self._store.state(machine), generation, seq) is None:
            return _gone(segment)
        if isinstance(error, StoredDamage):
            return error
        return StoreFailed(f"A segment cannot be read: {error}.", remedy="Check the store's disk.")


def _gone(segment: _Key) -> SegmentGone:
    return SegmentGone(f"Segment {segment[1]}/{segment[2]} has been folded away.", remedy="Read it again.")
