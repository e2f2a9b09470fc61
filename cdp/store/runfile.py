"""Runs on disk: sorted, immutable, every page with a checksum.

    ┌─────────┐ 0
    │ head    │ magic, whose run it is, segments covered, entries per class
    │ fences  │ u64 per page: its first key           class after class
    │ sums    │ u64 per page: blake3 of the page
    │ digest  │ 32 bytes of blake3 over all of the above
    ├─────────┤ the next multiple of 4096
    │ pages   │ 1024 keys, then their 1024 values; zeros behind the last entry of a class
    └─────────┘

A file is written under a temporary name, synced and renamed. It is only ever derived data: whatever is wrong with one,
the answer is to delete it and to build it again.
"""

from __future__ import annotations

import itertools
import struct
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Lock
from typing import Final

import numpy as np
from blake3 import blake3

from cdp.store.errors import RunDamaged
from cdp.store.files import Files, opened
from cdp.store.runs import CLASSES, U64, MemoryRun, Run
from journal.position import DIGEST_BYTES

MAGIC: Final = b"CDPRUNS\x01"
PAGE_ENTRIES: Final = 1024
PAGE_BYTES: Final = PAGE_ENTRIES * 16
_READ_PAGES: Final = 256
"""Pages read at once: 4 MiB."""
CACHE_PAGES: Final = 2048
"""Pages kept in memory, for all runs of a store together: 32 MiB."""
_HEAD: Final = struct.Struct(f"<8s16sIIQQ32s{len(CLASSES)}Q")
_SUFFIX: Final = ".run"


class PageCache:
    """The pages used last. Thread-safe."""

    def __init__(self, pages_max: int = CACHE_PAGES) -> None:
        self._pages: OrderedDict[tuple[Path, int], tuple[U64, U64]] = OrderedDict()
        self._pages_max = pages_max
        self._lock = Lock()

    def get(self, path: Path, page: int) -> tuple[U64, U64] | None:
        with self._lock:
            found = self._pages.get((path, page))
            if found is not None:
                self._pages.move_to_end((path, page))
            return found

    def put(self, path: Path, page: int, columns: tuple[U64, U64]) -> None:
        with self._lock:
            self._pages[path, page] = columns
            while len(self._pages) > self._pages_max:
                self._pages.popitem(last=False)


class FileRun:
    def __init__(self, files: Files, path: Path, machine: uuid.UUID, cache: PageCache) -> None:
        """Raises ``RunDamaged`` and ``OSError``."""
        self.path = path
        self._files = files
        self._cache = cache
        with opened(files, path) as handle:
            head = files.read(handle, _HEAD.size, 0)
            if len(head) < _HEAD.size or head[:8] != MAGIC:
                raise _damaged(path)
            _, owner, self.generation, pages, self.first, self.last, self.digest, *counts = _HEAD.unpack(head)
            self.counts: tuple[int, ...] = tuple(counts)
            if owner != machine.bytes or pages != sum(_pages(entries) for entries in counts):
                raise _damaged(path)
            rest = files.read(handle, pages * 16 + DIGEST_BYTES, _HEAD.size)
        if len(rest) != pages * 16 + DIGEST_BYTES or blake3(head + rest[: pages * 16]).digest() != rest[pages * 16 :]:
            raise _damaged(path)
        fences = np.frombuffer(rest, np.uint64, pages)
        self._sums = rest[pages * 8 : pages * 16]
        self._data_at = _data_at(pages)
        starts = np.cumsum([0, *(_pages(entries) for entries in counts)]).tolist()
        self._first_page: list[int] = starts[:-1]
        self._fences = [fences[a:b] for a, b in itertools.pairwise(starts)]

    def bounds(self, length_class: int, low: int, high: int) -> tuple[int, int]:
        return self._bound(length_class, low), self._bound(length_class, high)

    def slices(self, length_class: int, start: int, stop: int) -> Iterator[tuple[U64, U64]]:
        at = start
        while at < stop:
            page = at // PAGE_ENTRIES
            pages = min(_READ_PAGES, -(-stop // PAGE_ENTRIES) - page)
            keys, values = self._columns(length_class, page, pages)
            first = page * PAGE_ENTRIES
            piece = slice(at - first, min(stop, first + pages * PAGE_ENTRIES) - first)
            yield keys[piece], values[piece]
            at = first + pages * PAGE_ENTRIES

    def verify(self) -> int:
        """Read every page, past the cache; returns the bytes. Raises ``RunDamaged`` and ``OSError``."""
        pages = sum(_pages(entries) for entries in self.counts)
        used = _HEAD.size + pages * 16 + DIGEST_BYTES
        with opened(self._files, self.path) as handle:
            if any(self._files.read(handle, self._data_at - used, used)):
                raise _damaged(self.path)
        for length_class, entries in enumerate(self.counts):
            for page in range(0, _pages(entries), _READ_PAGES):
                self._read_columns(length_class, page, min(_READ_PAGES, _pages(entries) - page))
        return self._data_at + pages * PAGE_BYTES

    def _bound(self, length_class: int, key: int) -> int:
        """The number of entries with a smaller key."""
        page = int(np.searchsorted(self._fences[length_class], np.uint64(key))) - 1
        if page < 0:
            return 0
        keys, _ = self._columns(length_class, page, 1)
        entries = min(PAGE_ENTRIES, self.counts[length_class] - page * PAGE_ENTRIES)
        return page * PAGE_ENTRIES + int(np.searchsorted(keys[:entries], np.uint64(key)))

    def _columns(self, length_class: int, page: int, pages: int) -> tuple[U64, U64]:
        """Keys and values of whole pages. Only single pages are cached: a long scan would push out all others."""
        number = self._first_page[length_class] + page
        if pages == 1 and (cached := self._cache.get(self.path, number)) is not None:
            return cached
        columns = self._read_columns(length_class, page, pages)
        if pages == 1:
            self._cache.put(self.path, number, columns)
        return columns

    def _read_columns(self, length_class: int, page: int, pages: int) -> tuple[U64, U64]:
        number = self._first_page[length_class] + page
        with opened(self._files, self.path) as handle:
            raw = self._files.read(handle, pages * PAGE_BYTES, self._data_at + number * PAGE_BYTES)
        if len(raw) != pages * PAGE_BYTES:
            raise _damaged(self.path)
        for index in range(pages):
            found = blake3(raw[index * PAGE_BYTES : (index + 1) * PAGE_BYTES]).digest(8)
            if found != self._sums[(number + index) * 8 : (number + index + 1) * 8]:
                raise _damaged(self.path)
        columns = np.frombuffer(raw, np.uint64).reshape(pages, 2, PAGE_ENTRIES)
        return columns[:, 0, :].reshape(-1), columns[:, 1, :].reshape(-1)


class RunShelf:
    """The run files of one machine. ``digest_at(generation, seq)`` tells whether a run is of the present history."""

    def __init__(
        self,
        files: Files,
        directory: Path,
        machine: uuid.UUID,
        cache: PageCache,
        digest_at: Callable[[int, int], bytes | None],
    ) -> None:
        self._files = files
        self._directory = directory
        self._machine = machine
        self._cache = cache
        self._digest_at = digest_at
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def runs(self, generation: int) -> list[Run]:
        candidates: list[FileRun] = []
        for path in sorted(self._directory.glob(f"{generation:08x}-*")):
            run = self._open(path)
            if run is None:
                self._files.unlink(path)
            else:
                candidates.append(run)
        # A merged run and the ones it was made of may be there together: the widest from the left wins.
        chosen: list[Run] = []
        last = 0
        for run in sorted(candidates, key=lambda run: (run.first, -run.last)):
            if run.first > last and (not chosen or run.first == last + 1):
                chosen.append(run)
                last = run.last
            else:
                self._files.unlink(run.path)
        return chosen

    def keep(self, run: MemoryRun) -> Run:
        path = self._directory / f"{run.generation:08x}-{run.first:016x}-{run.last:016x}{_SUFFIX}"
        temporary = path.with_suffix(".new")
        write_run(self._files, temporary, self._machine, run)
        self._files.replace(temporary, path)
        return FileRun(self._files, path, self._machine, self._cache)

    def drop(self, run: Run) -> None:
        if isinstance(run, FileRun):
            self._files.unlink(run.path)

    def is_named(self, run: Run, name: str) -> bool:
        return isinstance(run, FileRun) and run.path.name == name

    def _open(self, path: Path) -> FileRun | None:
        """None for one that is damaged, unfinished or not of this history."""
        if path.suffix != _SUFFIX:
            return None
        try:
            run = FileRun(self._files, path, self._machine, self._cache)
        except (RunDamaged, OSError):
            return None
        return run if self._digest_at(run.generation, run.last) == run.digest else None


def verify_runs(files: Files, directory: Path, machine: uuid.UUID) -> Iterator[tuple[Path, int, RunDamaged | None]]:
    """Each run file of a machine: its path, its bytes, and what is wrong with it."""
    for path in sorted(directory.glob(f"*{_SUFFIX}")):
        try:
            checked = FileRun(files, path, machine, PageCache(0)).verify()
        except RunDamaged as error:
            yield path, 0, error
        except FileNotFoundError:
            continue  # merged into a larger one meanwhile
        else:
            yield path, checked, None


def write_run(files: Files, path: Path, machine: uuid.UUID, run: MemoryRun) -> None:
    """Write and sync. Raises ``OSError``."""
    fences: list[U64] = []
    sums = bytearray()
    bodies: list[bytes] = []
    for keys, values in zip(run.keys, run.values, strict=True):
        pages = _pages(len(keys))
        columns = np.zeros((pages, 2, PAGE_ENTRIES), np.uint64)
        for column, source in enumerate((keys, values)):
            padded = np.zeros(pages * PAGE_ENTRIES, np.uint64)
            padded[: len(source)] = source
            columns[:, column, :] = padded.reshape(pages, PAGE_ENTRIES)
        fences.append(keys[::PAGE_ENTRIES])
        body = columns.tobytes()
        for page in range(pages):
            sums += blake3(memoryview(body)[page * PAGE_BYTES : (page + 1) * PAGE_BYTES]).digest(8)
        bodies.append(body)
    pages = len(sums) // 8
    head = _HEAD.pack(MAGIC, machine.bytes, run.generation, pages, run.first, run.last, run.digest, *run.counts)
    head += np.concatenate(fences).tobytes() + bytes(sums)
    head += blake3(head).digest()
    data_at = _data_at(pages)
    files.create_sparse(path, data_at + pages * PAGE_BYTES)
    with opened(files, path, write=True) as handle:
        files.write(handle, [head, bytes(data_at - len(head)), *bodies], 0)
        files.sync(handle)


def _pages(entries: int) -> int:
    return -(-entries // PAGE_ENTRIES)


def _data_at(pages: int) -> int:
    return -(-(_HEAD.size + pages * 16 + DIGEST_BYTES) // 4096) * 4096


def _damaged(path: Path) -> RunDamaged:
    return RunDamaged(
        f"The point-in-time index file {path.name} is damaged.",
        remedy="It is built again from the segments by itself.",
        file=path.name,
    )
