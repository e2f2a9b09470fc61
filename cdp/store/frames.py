"""Parts of stored payloads: only the frames that are needed are read, checked and decompressed."""

from __future__ import annotations

import threading
import uuid
from collections import OrderedDict
from typing import Final

import zstandard

from cdp.store.errors import StoredDamage, StoreFailed, UnknownPosition
from cdp.store.files import opened
from cdp.store.ledger import Ledger
from cdp.store.record import Layout, read_layout
from journal.decoder import expand, expand_into
from journal.errors import SegmentDamaged
from journal.segment import FRAME_BYTES

CACHE_FRAMES: Final = 1024
"""64 MiB of decompressed payload, for all readers of a store together."""
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
            if content is None and skip == 0 and len(out) - done >= FRAME_BYTES:
                # Whole frames go to their place at once: who reads so much does not come back for it.
                expanded = self._expand_into(out[done:], segment, frame)
                done += expanded * FRAME_BYTES
                frame += expanded
                if expanded:
                    continue
            if content is None:
                content = self._load(segment, frame, -(-(skip + len(out) - done) // FRAME_BYTES))
            take = min(len(content) - skip, len(out) - done)
            out[done : done + take] = memoryview(content)[skip : skip + take]
            done += take
            frame, skip = frame + 1, 0

    def _expand_into(self, out: memoryview, segment: _Key, frame: int) -> int:
        """Fill ``out`` with as many whole frames as fit, from ``frame`` on; returns how many there were."""
        layout = self._layout(segment)
        # The payload's last frame may be a shorter one.
        last = min(frame + len(out) // FRAME_BYTES, layout.header.payload_bytes // FRAME_BYTES)
        if last <= frame:
            return 0
        last = _bounded(layout, frame, last)
        try:
            stored, first = self._stored(layout, frame, last), layout.starts[frame]
            for number in range(frame, last):
                piece = stored[layout.starts[number] - first : layout.starts[number + 1] - first]
                target = out[(number - frame) * FRAME_BYTES : (number - frame + 1) * FRAME_BYTES]
                layout.check_frame(number, piece)
                if layout.raw[number]:
                    target[:] = piece
                else:
                    self._expand(piece, target)
        except (StoredDamage, OSError) as error:
            raise self._explained(segment, error) from error
        return last - frame

    def _expand(self, piece: memoryview, target: memoryview) -> None:
        try:
            expand_into(self._decompressor(), piece, target)
        except SegmentDamaged as error:
            raise StoredDamage(error.sentence, remedy=error.remedy) from error

    def _stored(self, layout: Layout, frame: int, last: int) -> memoryview:
        """The bytes of the frames ``frame`` to ``last`` (not included) as they are stored."""
        with opened(self._store.files, layout.path) as handle:
            length = layout.starts[last] - layout.starts[frame]
            return memoryview(self._store.files.read(handle, length, layout.starts[frame]))

    def _decompressor(self) -> zstandard.ZstdDecompressor:
        """One for each thread: they serve one only."""
        known: zstandard.ZstdDecompressor | None = getattr(self._local, "decompressor", None)
        if known is None:
            known = self._local.decompressor = zstandard.ZstdDecompressor()
        return known

    def _load(self, segment: _Key, frame: int, count: int) -> bytes:
        """Read ``count`` frames at most, from ``frame`` on, into the cache; returns the first."""
        layout = self._layout(segment)
        last = _bounded(layout, frame, min(frame + count, len(layout.starts) - 1))
        try:
            stored = self._stored(layout, frame, last)
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
        try:
            return expand(self._decompressor(), piece, want)
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
        if entry is None or self._store.pool.row(entry.file) is None:
            raise _gone(segment)
        try:
            layout = read_layout(self._store.files, self._store.pool.path(entry.file), entry)
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


def _bounded(layout: Layout, frame: int, last: int) -> int:
    """At most ``last``, so that not too much is read at once."""
    while last > frame + 1 and layout.starts[last] - layout.starts[frame] > _READ_BYTES:
        last = frame + max(1, (last - frame) // 2)
    return last


def _gone(segment: _Key) -> SegmentGone:
    return SegmentGone(f"Segment {segment[1]}/{segment[2]} has been folded away.", remedy="Read it again.")
