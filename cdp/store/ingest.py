"""Taking in segments: verify, write, sync, acknowledge.

put_segment              crash here means
──────────────────────   ──────────────────────────────────────────────────────────
header, chain            nothing has happened
body on its way          bytes without a record header, which nobody looks at
digests, disks           the same
record header written    a torn tail at most; cut off at start
fdatasync                durable: found by the scan at start, though nobody was told
acknowledged             found by the scan at start
index committed          in the index

The body of a large segment is on its way to the disk while its digests are being checked: hashing 8 MB takes as long as
writing them. It becomes a record only with its header, which is written when everything has been verified.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, Final

import numpy as np

from cdp.store.errors import StoreFailed, StoreFull, UnknownDisk
from cdp.store.index import disk_error
from cdp.store.machines import Machines
from cdp.store.record import RECORD_HEADER_BYTES, pack_record, record_bytes, sums_ahead
from cdp.store.records import Entry, Machine
from cdp.store.state import MachineState
from journal.chain import Verdict, check_machine, judge
from journal.decoder import Segment, decode
from journal.errors import CdpError
from journal.extent import Extents
from journal.position import Position
from journal.segment import Header

_PIECE_BYTES: Final = 2 << 20


class Ingest(Machines):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._writer = ThreadPoolExecutor(1, "store-body")
        self._large = 0
        self._large_lock = threading.Lock()

    def _let_go(self) -> None:
        self._writer.shutdown()
        super()._let_go()

    def put_segment(self, machine: uuid.UUID, raw: bytes | bytearray | memoryview) -> tuple[Position, bool]:
        """Store one encoded segment; durable on return. Returns its position and whether it had been stored before.

        Raises ``SegmentDamaged``, ``ForeignSegment``, ``PositionGap``, ``PositionFork``, ``StaleGeneration``,
        ``UnknownGeneration``, ``UnknownDisk``, ``StoreFull``, ``StoreFailed``, ``UnknownMachine``; the store is
        unchanged then.
        """
        state = self.state(machine)
        view = memoryview(raw).cast("B")
        header = Header.unpack(view)
        check_machine(header, machine)
        with state.writing:
            self.state(machine)  # it may have been removed meanwhile
            if judge(header, state.tip, lambda seq: self._digest_at(state, seq)) is Verdict.DUPLICATE:
                return decode(view).header.position, True
            try:
                self.check_accepting()
                entry = self._append(state, header, view)
            except (StoreFull, StoreFailed) as error:
                state.refusal = error
                raise
            with state.lock:
                state.refusal = None
                state.end += entry.record_bytes
                state.file_segments += 1
                state.pending[entry.header.seq] = entry
                state.tip, state.tip_entry = entry.header.position, entry
                if entry.header.is_recovery_point:
                    state.recovery_point = state.tip
                state.check()
        self.added_pending()
        return header.position, False

    def refusal(self, machine: uuid.UUID) -> CdpError | None:
        """Why the newest segment that was sent could not be stored; None once one has been."""
        return self.state(machine).refusal

    def _append(self, state: MachineState, header: Header, raw: memoryview) -> Entry:
        """Verify, write the record behind the last one and sync it; counts only once the caller has moved ``end``."""
        length = record_bytes(header.segment_bytes, header.frame_count)
        if state.file is None or state.end + length > state.file.size_bytes:
            self.roll_file(state, length)
        assert state.file is not None
        try:
            early = self.early_bytes <= len(raw) == header.segment_bytes
            segment, sums = self._decoded_while_written(state, header, raw) if early else (decode(raw), None)
            _check_extents(state.machine, segment.extents)
            head, body, tail = pack_record(segment, state.file.tag, state.end, sums)
            if early:
                self.files.write(state.handle, [tail], state.end + RECORD_HEADER_BYTES + len(raw))
                self.files.write(state.handle, [head], state.end)
            else:
                self.files.write(state.handle, [head, body, tail], state.end)
            self.files.sync(state.handle)
        except OSError as error:
            failure = disk_error(error, "a segment")
            if isinstance(failure, StoreFull):
                failure.fields["segment_bytes"] = header.segment_bytes
            raise failure from error
        return Entry(header, state.file.number, state.end, length)

    def _decoded_while_written(
        self, state: MachineState, header: Header, raw: memoryview
    ) -> tuple[Segment, bytes | None]:
        """The decoded segment, whose body is on its way to the disk, and the sums of its frames if they are known
        already. Another thread writes if this is the only large segment: otherwise the processors are busy as it is."""
        with self._large_lock:
            self._large += 1
            is_alone = self._large == 1
        try:
            if not is_alone:
                self._write_body(state, header, raw)
                return decode(raw), None
            writing = self._writer.submit(self._write_body_and_sum, state, header, raw)
            try:
                segment = decode(raw)
            finally:
                # Whatever comes next finds nobody writing there.
                wait([writing])
            return segment, writing.result()
        finally:
            with self._large_lock:
                self._large -= 1

    def _write_body_and_sum(self, state: MachineState, header: Header, raw: memoryview) -> bytes:
        self._write_body(state, header, raw)
        return sums_ahead(header, raw)

    def _write_body(self, state: MachineState, header: Header, raw: memoryview) -> None:
        """Piece by piece, so that the disk is at work from the first on; in whole pages, so that none has to be read
        before. Zeros are where the rest of the record will be."""
        length = record_bytes(header.segment_bytes, header.frame_count)
        before, after = bytes(RECORD_HEADER_BYTES), bytes(length - RECORD_HEADER_BYTES - len(raw))
        for start in range(0, length, _PIECE_BYTES):
            stop = min(start + _PIECE_BYTES, length)
            self.files.write(state.handle, _cut([before, raw, after], start, stop), state.end + start)
            self.files.start(state.handle, stop - start, state.end + start)

    def _digest_at(self, state: MachineState, seq: int) -> bytes | None:
        entry = self.entry(state, state.tip.generation, seq)
        if entry is not None:
            return entry.header.digest
        base = state.base
        if base is not None and (base.target_position.generation, base.target_position.seq) == (
            state.tip.generation,
            seq,
        ):
            return base.target_position.digest
        return None


def _cut(buffers: Sequence[bytes | memoryview], start: int, stop: int) -> list[bytes | memoryview]:
    """The bytes ``start`` to ``stop`` of the buffers laid end to end."""
    parts = []
    for buffer in buffers:
        parts.append(buffer[max(0, start) : max(0, stop)])
        start, stop = start - len(buffer), stop - len(buffer)
    return [part for part in parts if len(part)]


def _check_extents(machine: Machine, extents: Extents) -> None:
    """Every extent lies on a disk that the machine has."""
    for index in np.unique(extents.disks).tolist():
        disk = machine.disk(index)
        if disk is None:
            raise UnknownDisk(
                f"The segment writes to disk {index}, which machine {machine.name!r} does not have.",
                remedy="Restart the agent, so that it reports the machine's disks.",
                disk=index,
            )
        mine = extents.disks == index
        end = int((extents.offsets[mine] + extents.lengths[mine]).max())
        if end > disk.size_bytes:
            raise UnknownDisk(
                f"The segment writes up to byte {end} of disk {index} ({disk.name}), which has {disk.size_bytes}.",
                remedy="The disk may have grown: restart the agent, so that it reports the new size.",
                disk=index,
                end=end,
                size_bytes=disk.size_bytes,
            )
