"""Parts of stored payloads: only the frames that are needed are read, checked and decompressed."""

from __future__ import annotations

import threading
import uuid
from collections import OrderedDict
from collections.abc import Iterable, Iterator
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
_Piece = tuple[int, memoryview]
"""Where in a frame, and where to."""


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

    def read_parts(self, parts: Iterable[tuple[int, memoryview]], segment: _Key) -> None:
        """Fill each of ``(offset, out)`` with the payload of ``segment`` (machine, generation, seq) from ``offset`` on.
        Each frame is read and expanded once, and neighbours are read together.

        Raises ``SegmentGone``, ``StoredDamage``, ``StoreFailed``.
        """
        wanted: dict[int, list[_Piece]] = {}
        for offset, out in parts:
            done = 0
            while done < len(out):
                frame, skip = divmod(offset + done, FRAME_BYTES)
                take = min(FRAME_BYTES - skip, len(out) - done)
                wanted.setdefault(frame, []).append((skip, out[done : done + take]))
                done += take
        missing = []
        for frame in sorted(wanted):
            content = self._known((segment, frame))
            if content is None:
                missing.append(frame)
            else:
                _hand_out(content, wanted[frame])
        if not missing:
            return
        layout = self._layout(segment)
        try:
            for first, last in _runs(layout, missing):
                self._expand_run(layout, segment, first, last, wanted)
        except (StoredDamage, SegmentDamaged, OSError) as error:
            raise self._explained(segment, error) from error

    def _expand_run(
        self, layout: Layout, segment: _Key, first: int, last: int, wanted: dict[int, list[_Piece]]
    ) -> None:
        """Hand out what is wanted of the frames ``first`` to ``last`` (not included), of all of which something is."""
        stored, start = self._stored(layout, first, last), layout.starts[first]
        for frame in range(first, last):
            piece = stored[layout.starts[frame] - start : layout.starts[frame + 1] - start]
            layout.check_frame(frame, piece)
            size = min(FRAME_BYTES, layout.header.payload_bytes - frame * FRAME_BYTES)
            pieces = wanted[frame]
            if len(pieces) == 1 and len(pieces[0][1]) == size:  # to its place at once
                if layout.raw[frame]:
                    pieces[0][1][:] = piece
                else:
                    expand_into(self._local.decompressor, piece, pieces[0][1])
                continue
            content = bytes(piece) if layout.raw[frame] else expand(self._local.decompressor, piece, size)
            _hand_out(content, pieces)
            self._keep((segment, frame), content, sum(len(out) for _, out in pieces))

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

    def _stored(self, layout: Layout, frame: int, last: int) -> memoryview:
        """The bytes of the frames ``frame`` to ``last`` (not included) as they are stored."""
        with opened(self._store.files, layout.path) as handle:
            length = layout.starts[last] - layout.starts[frame]
            return memoryview(self._store.files.read(handle, length, layout.starts[frame]))

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

    def _explained(
        self, segment: _Key, error: StoredDamage | SegmentDamaged | OSError
    ) -> StoredDamage | StoreFailed | SegmentGone:
        """Damage, or a file that retention has recycled under the reader?"""
        machine, generation, seq = segment
        with self._lock:
            self._layouts.pop(segment, None)
        if self._store.entry(self._store.state(machine), generation, seq) is None:
            return _gone(segment)
        if isinstance(error, StoredDamage):
            return error
        if isinstance(error, SegmentDamaged):
            return StoredDamage(error.sentence, remedy=error.remedy)
        return StoreFailed(f"A segment cannot be read: {error}.", remedy="Check the store's disk.")


def _hand_out(content: bytes, pieces: list[_Piece]) -> None:
    for skip, out in pieces:
        out[:] = memoryview(content)[skip : skip + len(out)]


def _runs(layout: Layout, frames: list[int]) -> Iterator[tuple[int, int]]:
    """First and last (not included) of neighbours among ascending ``frames``, so that not too much is read at once."""
    first = frames[0]
    last = first + 1
    for frame in frames[1:]:
        if frame != last or layout.starts[frame + 1] - layout.starts[first] > _READ_BYTES:
            yield first, last
            first = frame
        last = frame + 1
    yield first, last


def _gone(segment: _Key) -> SegmentGone:
    return SegmentGone(f"Segment {segment[1]}/{segment[2]} has been folded away.", remedy="Read it again.")
