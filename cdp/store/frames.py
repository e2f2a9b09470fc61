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
LITTLE_BYTES: Final = FRAME_BYTES // 8
"""A page of a database."""
CACHE_LAYOUTS: Final = 4096
"""An hour of them: some 10 MiB."""
_READ_BYTES: Final = 8 << 20
_Key = tuple[uuid.UUID, int, int]


class SegmentGone(UnknownPosition):
    """Retention has folded the segment since its place was looked up; the base image has what it wrote."""

    code = "segment-gone"


class _OfThread(threading.local):
    """What serves one thread only."""

    def __init__(self) -> None:
        self.decompressor = zstandard.ZstdDecompressor()
        self.last_key: tuple[_Key, int] | None = None
        self.last = b""


class Frames:
    """Thread-safe.

    What is kept: of each thread the last frame that it wanted in part, for the rest of it is often wanted next; and for
    all of them those of which little was wanted, for the rest may be wanted by anybody. Others are not: wherever a
    whole disk is read, they drove those out.
    """

    def __init__(self, store: Ledger) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._layouts: OrderedDict[_Key, Layout] = OrderedDict()
        self._frames: OrderedDict[tuple[_Key, int], bytes] = OrderedDict()
        self._local = _OfThread()

    def read_into(self, out: memoryview, segment: _Key, offset: int) -> None:
        """Fill ``out`` with the payload of ``segment`` (machine, generation, seq) from ``offset`` on.

        Raises ``SegmentGone``, ``StoredDamage``, ``StoreFailed``.
        """
        done = 0
        while done < len(out):
            frame, skip = divmod(offset + done, FRAME_BYTES)
            content = self._known((segment, frame))
            if content is None:
                done += self._expand_into(out[done:], segment, frame, skip)
            else:
                done += _part(out[done:], content, skip)

    def _expand_into(self, out: memoryview, segment: _Key, frame: int, skip: int) -> int:
        """Fill ``out`` from byte ``skip`` of ``frame`` on, as far as one look at the disk goes; the bytes filled."""
        layout = self._layout(segment)
        last = min(frame - (-(skip + len(out)) // FRAME_BYTES), len(layout.starts) - 1)
        last = _bounded(layout, frame, last)
        done = 0
        try:
            stored, first = self._stored(layout, frame, last), layout.starts[frame]
            for number in range(frame, last):
                piece = stored[layout.starts[number] - first : layout.starts[number + 1] - first]
                layout.check_frame(number, piece)
                size = min(FRAME_BYTES, layout.header.payload_bytes - number * FRAME_BYTES)
                if skip == 0 and len(out) - done >= size:
                    # Whole frames go to their place at once.
                    target = out[done : done + size]
                    if layout.raw[number]:
                        target[:] = piece
                    else:
                        self._expand(piece, target)
                    done += size
                    continue
                content = bytes(piece) if layout.raw[number] else self._expanded(piece, size)
                taken = _part(out[done:], content, skip)
                self._keep((segment, number), content, taken)
                done, skip = done + taken, 0
        except (StoredDamage, OSError) as error:
            raise self._explained(segment, error) from error
        return done

    def _known(self, key: tuple[_Key, int]) -> bytes | None:
        if self._local.last_key == key:
            return self._local.last
        with self._lock:
            content = self._frames.get(key)
            if content is not None:
                self._frames.move_to_end(key)
            return content

    def _keep(self, key: tuple[_Key, int], content: bytes, wanted_bytes: int) -> None:
        self._local.last_key, self._local.last = key, content
        if wanted_bytes > LITTLE_BYTES:
            return
        with self._lock:
            self._frames[key] = content
            while len(self._frames) > CACHE_FRAMES:
                self._frames.popitem(last=False)

    def _expand(self, piece: memoryview, target: memoryview) -> None:
        try:
            expand_into(self._local.decompressor, piece, target)
        except SegmentDamaged as error:
            raise StoredDamage(error.sentence, remedy=error.remedy) from error

    def _stored(self, layout: Layout, frame: int, last: int) -> memoryview:
        """The bytes of the frames ``frame`` to ``last`` (not included) as they are stored."""
        with opened(self._store.files, layout.path) as handle:
            length = layout.starts[last] - layout.starts[frame]
            return memoryview(self._store.files.read(handle, length, layout.starts[frame]))

    def _expanded(self, piece: memoryview, size: int) -> bytes:
        try:
            return expand(self._local.decompressor, piece, size)
        except SegmentDamaged as error:
            raise StoredDamage(error.sentence, remedy=error.remedy) from error

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


def _part(out: memoryview, content: bytes, skip: int) -> int:
    take = min(len(content) - skip, len(out))
    out[:take] = memoryview(content)[skip : skip + take]
    return take


def _bounded(layout: Layout, frame: int, last: int) -> int:
    """At most ``last``, so that not too much is read at once."""
    while last > frame + 1 and layout.starts[last] - layout.starts[frame] > _READ_BYTES:
        last = frame + max(1, (last - frame) // 2)
    return last


def _gone(segment: _Key) -> SegmentGone:
    return SegmentGone(f"Segment {segment[1]}/{segment[2]} has been folded away.", remedy="Read it again.")
