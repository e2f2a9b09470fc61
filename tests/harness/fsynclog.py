"""Numbered records that were fsynced, on two disks in turn; and what a recovered pair must hold of them.

    A:n written, fsynced ─► B:n written, fsynced ─► A:n+1 …          each completed fsync is noted off the disks

An image pair of second T holds every record whose fsync had returned before T, none whose write began well after
T, and never B:n without A:n. Times are of the monotonic clock that the agent seals by.
"""

from __future__ import annotations

import os
import struct
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

RECORD = struct.Struct("<QQ108sI")
"""Number, monotonic time in ns, filler, crc32 of all that precedes it."""
NOTE = struct.Struct("<BQQQ")
"""Side, number, monotonic ns before the write and after the fsync: one per completed fsync, in order."""
SIDES = ("A", "B")
LOG_NAME = "fsync.log"
FUTURE_SLACK_NS = 10**9
"""A cut takes in a little that came after its clock reading; a second more would be another recovery point."""


def record(number: int, now_ns: int) -> bytes:
    body = struct.pack("<QQ108s", number, now_ns, number.to_bytes(8, "big") * 13)
    return body + zlib.crc32(body).to_bytes(4, "little")


def write(paths: list[Path], notes: Path, pairs_per_s: float) -> None:
    """Append until the process is ended. One file a side, opened for append; the notes need no fsync: the machine
    itself does not die here."""
    files = [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644) for path in paths]
    for path in paths:
        directory = os.open(path.parent, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)
    with notes.open("ab", buffering=0) as out:
        number, started = 0, time.monotonic()
        while True:
            for side, fd in enumerate(files):
                began = time.monotonic_ns()
                os.write(fd, record(number, began))
                os.fsync(fd)
                out.write(NOTE.pack(side, number, began, time.monotonic_ns()))
            number += 1
            # The pace is what this program is for.
            time.sleep(max(0.0, started + number / pairs_per_s - time.monotonic()))


def held(raw: bytes) -> int:
    """How many records from number 0 on are whole: what a reader of the log would trust."""
    count = 0
    for at in range(0, len(raw) - RECORD.size + 1, RECORD.size):
        piece = raw[at : at + RECORD.size]
        number, _, _, crc = RECORD.unpack(piece)
        if number != count or zlib.crc32(piece[:-4]) != crc:
            break
        count += 1
    return count


@dataclass(frozen=True, slots=True)
class Verdict:
    """Records by which the pair is wrong; all empty when it is right. ``held`` counts per side."""

    held: tuple[int, int]
    missing: tuple[tuple[str, int], ...]
    future: tuple[tuple[str, int], ...]
    skewed: tuple[int, ...]

    @property
    def right(self) -> bool:
        return not (self.missing or self.future or self.skewed)


@dataclass(frozen=True, slots=True)
class Notes:
    """Per side, by number: when the write began and when its fsync had returned (monotonic ns)."""

    began_ns: tuple[list[int], list[int]]
    fsynced_ns: tuple[list[int], list[int]]

    @classmethod
    def read(cls, path: Path) -> Notes:
        raw = path.read_bytes()
        notes = cls(([], []), ([], []))
        for side, number, began, fsynced in NOTE.iter_unpack(raw[: len(raw) // NOTE.size * NOTE.size]):
            assert number == len(notes.began_ns[side]), "the notes are in order"
            notes.began_ns[side].append(began)
            notes.fsynced_ns[side].append(fsynced)
        return notes

    def judge(self, logs: tuple[bytes, bytes], sealed_ns: int) -> Verdict:
        """The logs as they were read from a pair recovered at the recovery point sealed at ``sealed_ns``."""
        counts = (held(logs[0]), held(logs[1]))
        missing: list[tuple[str, int]] = []
        future: list[tuple[str, int]] = []
        for side, count in enumerate(counts):
            fsynced, began = self.fsynced_ns[side], self.began_ns[side]
            missing += [(SIDES[side], n) for n in range(count, len(fsynced)) if fsynced[n] < sealed_ns]
            future += [
                (SIDES[side], n) for n in range(min(count, len(began))) if began[n] > sealed_ns + FUTURE_SLACK_NS
            ]
        skewed = tuple(range(counts[0], counts[1]))
        return Verdict(counts, tuple(missing[:20]), tuple(future[:20]), skewed[:20])


if __name__ == "__main__":
    write([Path(sys.argv[1]), Path(sys.argv[2])], Path(sys.argv[3]), float(sys.argv[4]))
