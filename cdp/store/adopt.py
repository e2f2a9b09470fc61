"""An older copy of the index, put back on top of the segment files as they are now: what it does not know is adopted.

    base image newer than the row   the row becomes what the files' stamp says
    a file with another tag         it was recycled since: the rows of its old records go (they were folded)
    a file without a row            it was made since
    records that extend the chain   they become rows, file after file, as long as the chain goes on

Generations that were started since are not in the copy; what was stored in them cannot be adopted and is given up. Runs
on a closed store, before the copy is put in its place: opening a store deletes files that no row knows.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from cdp.store import tally
from cdp.store.files import Files, opened
from cdp.store.index import Index, Reader, Writer
from cdp.store.pool import closed
from cdp.store.record import ALIGN_BYTES, RECORD_HEADER_BYTES, RecordHeader
from cdp.store.records import (
    Base,
    Entry,
    Generation,
    Machine,
    SegmentFile,
    Tail,
    generation_key,
    segment_key,
    time_key,
)
from cdp.store.scan import scan_tail
from cdp.store.stamp import read_stamp
from journal.position import SEQ_MAX, Position

_TAG: Final = slice(16, 24)
"""Where the tag lies in a record header."""
RESEED: Final = "settings\0reseed/"


class Adopted(msgspec.Struct, kw_only=True):
    """Of one machine. ``tip``: the last position that is there now."""

    machine: str
    tip: str
    segments: int
    files: int


@dataclass(slots=True)
class _Found:
    """A file with records that the index does not know. ``starts``: offset of each record by generation and seq."""

    row: SegmentFile
    starts: dict[tuple[int, int], int]


def adopt(directory: Path, copy: Path, files: Files, map_bytes: int) -> list[Adopted]:
    """``copy``: the index, not in its place in the store's ``directory`` yet. Raises what opening an index raises, and
    ``OSError``."""
    index = Index(copy, map_bytes)
    try:
        with index.read() as txn:
            machines = list(txn.rows("machines", b"", Machine))
        for machine in machines:
            _adopt_base(index, directory, files, machine.uuid)
        found = _unknown_files(index, directory / "segments", files)
        adopted = [_adopt_machine(index, directory / "segments", files, machine, found) for machine in machines]
        _free_unused(index, found)
        return adopted
    finally:
        index.close()


def _adopt_base(index: Index, directory: Path, files: Files, machine: uuid.UUID) -> None:
    stamps = [
        stamp
        for path in sorted((directory / "base" / str(machine)).glob("*"))
        if (stamp := read_stamp(files, path)) is not None
    ]
    newest = max(stamps, key=lambda stamp: (stamp.root, stamp.target_position), default=None)
    with index.write() as txn:
        row = txn.get_row("bases", machine.bytes, Base)
        if newest is not None and (
            row is None or (newest.root, newest.target_position) >= (row.root, row.target_position)
        ):
            txn.put_row("bases", machine.bytes, newest)


def _unknown_files(index: Index, directory: Path, files: Files) -> list[_Found]:
    with index.read() as txn:
        known = {row.number: row for row in txn.rows("files", b"", SegmentFile)}
    unknown = []
    for path in sorted(directory.glob("*.seg")):
        if not path.stem.isdecimal():
            continue
        number = int(path.stem)
        row = _row_of(files, path, number)
        if row is not None and (number not in known or known[number].tag != row.tag):
            starts = {(head.generation, head.seq): at for at, head in _records(files, path, row, 0)}
            unknown.append(_Found(row, starts))
    with index.write() as txn:
        for found in unknown:
            _forget_records(txn, found.row.number)
    return unknown


def _row_of(files: Files, path: Path, number: int) -> SegmentFile | None:
    with opened(files, path) as handle:
        raw = files.read(handle, RECORD_HEADER_BYTES, 0)
    head = RecordHeader.unpack(raw, raw[_TAG])
    if head is None:
        return None
    return SegmentFile(number=number, machine=head.machine, tag=raw[_TAG], size_bytes=path.stat().st_size)


def _records(files: Files, path: Path, row: SegmentFile, at: int) -> Iterator[tuple[int, RecordHeader]]:
    """From ``at`` on: where each record starts, and its header."""
    with opened(files, path) as handle:
        while at + ALIGN_BYTES <= row.size_bytes:
            head = RecordHeader.unpack(files.read(handle, RECORD_HEADER_BYTES, at), row.tag)
            if head is None:
                return
            yield at, head
            at += head.record_bytes


def _forget_records(txn: Writer, number: int) -> None:
    """The rows of records that lay in a file before it was recycled."""
    gone = [entry for _, value in txn.scan("segments", b"", b"") if (entry := Entry.unpack(value)).file == number]
    for entry in gone:
        header = entry.header
        txn.delete("segments", segment_key(header.machine, header.generation, header.seq))
        txn.delete("times", time_key(header.machine, header))
        tally.removed(txn, header.machine, [entry])


def _adopt_machine(index: Index, directory: Path, files: Files, machine: Machine, found: list[_Found]) -> Adopted:
    with index.read() as txn:
        tip = _tip(txn, machine.uuid)
        tail = txn.get_row("tails", machine.uuid.bytes, Tail)
        row = None if tail is None else txn.get_row("files", tail.file.to_bytes(4, "big"), SegmentFile)
    segments = adopted = 0
    recycled = {one.row.number for one in found}
    if tail is not None and row is not None and row.machine == machine.uuid and row.number not in recycled:
        # What the base image holds by now needs no rows: the first record that does may lie further on.
        path = directory / f"{row.number:08d}.seg"
        starts = {(head.generation, head.seq): at for at, head in _records(files, path, row, tail.end)}
        if (start := starts.get((tip.generation, tip.seq + 1))) is not None:
            begin = msgspec.structs.replace(tail, end=start)
            tip, count = _scan(index, directory, files, row, begin, tip)
            segments += count
    while (following := _file_with(found, machine.uuid, tip)) is not None:
        start = following.starts[tip.generation, tip.seq + 1]
        begin = Tail(file=following.row.number, end=start, segments=0)
        tip, count = _scan(index, directory, files, following.row, begin, tip)
        if count == 0:
            break
        segments, adopted = segments + count, adopted + 1
    with index.write() as txn:
        # Whatever a standby has applied meanwhile: only a comparison tells.
        txn.put("rows", f"{RESEED}{machine.uuid}".encode(), b"the store was restored")
        txn.delete("cursors", machine.uuid.bytes + b"standby")
    return Adopted(machine=machine.name, tip=tip.short, segments=segments, files=adopted)


def _free_unused(index: Index, found: list[_Found]) -> None:
    """Files whose old records are gone and whose new ones could not be adopted are spare."""
    with index.write() as txn:
        tails = {tail.file for tail in txn.rows("tails", b"", Tail)}
        for one in found:
            key = one.row.number.to_bytes(4, "big")
            row = txn.get_row("files", key, SegmentFile)
            if row is not None and row.tag != one.row.tag and row.number not in tails:
                spare = SegmentFile(number=row.number, machine=None, tag=row.tag, size_bytes=row.size_bytes)
                txn.put_row("files", key, spare)


def _tip(txn: Reader, machine: uuid.UUID) -> Position:
    """As ``Core`` finds it: the newest segment of the live generation, its genesis, or what the base image holds."""
    generations = {row.number: row for row in txn.rows("generations", machine.bytes, Generation)}
    live = generations[max(generations)]
    prefix = generation_key(machine, live.number)
    rows = txn.scan_back("segments", segment_key(machine, live.number, SEQ_MAX), prefix)
    newest = next((Entry.unpack(value).header.position for _, value in rows), live.genesis(machine))
    base = txn.get_row("bases", machine.bytes, Base)
    if base is not None and base.target_position.generation == live.number:
        return max(newest, base.target_position)
    return newest


def _file_with(found: list[_Found], machine: uuid.UUID, tip: Position) -> _Found | None:
    wanted = (tip.generation, tip.seq + 1)
    return next((one for one in found if one.row.machine == machine and wanted in one.starts), None)


def _scan(  # noqa: PLR0917 (a file, where in it, and after what)
    index: Index, directory: Path, files: Files, row: SegmentFile, tail: Tail, tip: Position
) -> tuple[Position, int]:
    """Make rows of what follows ``tip`` in a file; the file becomes the machine's tail."""
    with opened(files, directory / f"{row.number:08d}.seg") as handle:
        scanned = scan_tail(files, handle, row, tail.end, tip)
    if not scanned.entries:
        return tip, 0
    machine = scanned.entries[0].header.machine
    with index.write() as txn:
        _close_tail(txn, machine, row.number)
        for entry in scanned.entries:
            header = entry.header
            txn.put("segments", segment_key(machine, header.generation, header.seq), entry.pack())
            txn.put("times", time_key(machine, header), bytes([header.flags]))
        tally.added(txn, machine, scanned.entries)
        count = tail.segments + len(scanned.entries)
        txn.put_row("tails", machine.bytes, Tail(file=row.number, end=scanned.end, segments=count))
        txn.put_row("files", row.number.to_bytes(4, "big"), row)
    return scanned.entries[-1].header.position, len(scanned.entries)


def _close_tail(txn: Writer, machine: uuid.UUID, number: int) -> None:
    """The file before ``number`` takes no more records."""
    tail = txn.get_row("tails", machine.bytes, Tail)
    if tail is None or tail.file == number:
        return
    key = tail.file.to_bytes(4, "big")
    row = txn.get_row("files", key, SegmentFile)
    if row is not None and row.machine == machine and row.segments is None:
        txn.put_row("files", key, closed(row, tail.segments))
