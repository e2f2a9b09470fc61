"""What every part of the store stands on: the lock, the index, the segment files and the state of each machine.

The index is committed some time after the acknowledgement; what it does not know yet is found by ``scan``.
Order of locks: a machine's ``folding``, its ``writing``, then the index, then the table of machines or a machine's
``lock``.
"""

from __future__ import annotations

import fcntl
import os
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Final

from cdp.store import tally
from cdp.store.errors import IndexDamaged, StoreFailed, StoreFormatUnknown, StoreLocked, UnknownMachine
from cdp.store.files import Files, opened, sync_directory
from cdp.store.index import Index, Writer
from cdp.store.pool import Pool, closed
from cdp.store.record import ALIGN_BYTES
from cdp.store.records import Base, Entry, Generation, Machine, Tail, generation_key, segment_key, time_key
from cdp.store.scan import scan_tail
from cdp.store.state import MachineState
from journal.errors import CdpError
from journal.position import SEQ_MAX, Position

FILE_BYTES: Final = 128 << 20
"""One segment file: a few of the largest segments, so that little is wasted at its end."""
MAP_BYTES: Final = 64 << 30
"""Address space for the index, not disk space: about 400 bytes a stored second."""
SPARES_MAX: Final = 8
EARLY_BYTES: Final = 512 << 10
"""From this size on, a segment's bytes are on their way to the disk while they are being verified."""
FLUSH_INTERVAL_S: Final = 0.5
"""How long an acknowledged segment may be missing from the index; bounds the scan at start."""


class Core:
    """Opening, closing, and the background commit of the index."""

    def __init__(
        self,
        directory: Path,
        *,
        file_bytes: int,
        map_bytes: int,
        spares_max: int,
        flush_interval_s: float,
        early_bytes: int,
        files: Files,
        clock_ns: Callable[[], int],
    ) -> None:
        self.directory = directory
        self.files = files
        self.clock_ns = clock_ns
        self.early_bytes = early_bytes
        self._flush_interval_s = flush_interval_s
        self._states: dict[uuid.UUID, MachineState] = {}
        self._names: dict[str, uuid.UUID] = {}
        self._states_lock = threading.Lock()
        self._wake = threading.Condition()
        self._pending_count = 0
        self._closing = False
        self._stopping = threading.Event()
        self._refusing: CdpError | None = None
        self._broken: BaseException | None = None
        self._lock_handle = _lock(directory)
        try:
            _check_index_is_there(directory)
            self.index = Index(directory / "index", map_bytes)
            self.pending_max = max(1, min(1024, self.index.reserve_bytes // (16 << 10)))
            self.pool = Pool(directory / "segments", files, self.index, file_bytes, spares_max)
            self._load()
        except BaseException:
            os.close(self._lock_handle)
            raise
        self._threads: list[threading.Thread] = []
        self.start_thread("store-flush", self._run_flusher)

    def close(self) -> None:
        """Commit what is pending and let go of the directory."""
        with self._wake:
            if self._closing:
                return
        self._stop_threads()
        try:
            self.flush()
        finally:
            self._let_go()

    def abandon(self) -> None:
        """Let go of the directory as a killed process would: nothing is committed any more. For crash tests."""
        self._stop_threads()
        self._let_go()

    def start_thread(self, name: str, work: Callable[[], None]) -> None:
        """Run ``work`` until the store is closed. If it fails, so does the next ``put_segment``."""

        def guarded() -> None:
            try:
                work()
            except BaseException as error:
                self._broken = error
                raise

        thread = threading.Thread(target=guarded, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _stop_threads(self) -> None:
        self._stopping.set()
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        for thread in self._threads:
            thread.join()

    def flush(self) -> None:
        """Commit every pending segment to the index. Raises ``StoreFull`` and ``StoreFailed``; nothing is lost then."""
        with self._states_lock:
            states = list(self._states.values())
        batch: list[tuple[MachineState, list[Entry], Tail]] = []
        for state in states:
            with state.lock:
                if state.pending:
                    batch.append((state, list(state.pending.values()), _tail(state)))
        if not batch:
            return
        with self.index.write() as txn:
            for state, entries, tail in batch:
                _commit_entries(txn, state.machine.uuid, entries, tail)
        for state, entries, _ in batch:
            self.forget_pending(state, entries)

    def check_accepting(self) -> None:
        """Raise if the store cannot take another segment now."""
        if self._broken is not None:
            raise StoreFailed(
                f"The background work of the store has failed: {self._broken}.",
                remedy="Restart the server; nothing that was acknowledged is lost.",
            ) from self._broken
        refusing = self._refusing
        if refusing is not None:
            raise type(refusing)(refusing.sentence, remedy=refusing.remedy, **refusing.fields)

    def added_pending(self) -> None:
        """One more segment waits for the index; commits at once if too many do."""
        with self._wake:
            self._pending_count += 1
            count = self._pending_count
            if count == 1:
                self._wake.notify_all()
        if count >= self.pending_max:
            self._flush_or_refuse()

    def state(self, machine: uuid.UUID) -> MachineState:
        with self._states_lock:
            state = self._states.get(machine)
        if state is None or state.machine.removing:
            raise UnknownMachine(
                f"There is no machine {machine}.",
                remedy="See 'cdp machines' for those that exist.",
                machine=str(machine),
            )
        return state

    def roll_file(self, state: MachineState, need_bytes: int) -> None:
        """Give the machine another file, with its pending segments committed first. Hold ``writing``."""
        claimed = self.pool.claim(state.machine.uuid, need_bytes)
        old = (
            None if state.file is None else closed(self.pool.row(state.file.number) or state.file, state.file_segments)
        )
        try:
            handle = self.files.open(self.pool.path(claimed.number), write=True)
        except OSError as error:
            self.pool.release(claimed)
            raise StoreFailed(f"A segment file cannot be opened: {error}.", remedy="Check the store's disk.") from error
        try:
            with self.index.write() as txn:
                entries = self.write_pending(txn, state)
                if old is not None:
                    self.pool.commit(txn, old)
                self.pool.commit(txn, claimed)
                txn.put_row("tails", state.machine.uuid.bytes, Tail(file=claimed.number, end=0, segments=0))
        except BaseException:
            self.files.close(handle)
            self.pool.release(claimed)
            raise
        if old is not None:
            self.pool.committed(old)
        self.pool.committed(claimed)
        self.forget_pending(state, entries)
        if state.handle >= 0:
            self.files.close(state.handle)
        with state.lock:
            state.file, state.handle, state.end, state.file_segments = claimed, handle, 0, 0

    def write_pending(self, txn: Writer, state: MachineState) -> list[Entry]:
        """Make the pending segments part of ``txn``; then call ``forget_pending``. Hold ``writing``."""
        entries = list(state.pending.values())
        if entries:
            _commit_entries(txn, state.machine.uuid, entries, _tail(state))
        return entries

    def forget_pending(self, state: MachineState, entries: list[Entry]) -> None:
        with state.lock:
            known = [entry for entry in entries if state.pending.get(entry.header.seq) is entry]
            for entry in known:
                del state.pending[entry.header.seq]
            state.check()
        with self._wake:
            self._pending_count -= len(known)

    def _flush_or_refuse(self) -> None:
        try:
            self.flush()
            self.index.check_room()
            self._refusing = None
        except CdpError as error:
            # Acknowledged segments stay pending and are durable in their files; no more are accepted meanwhile.
            self._refusing = error

    def _run_flusher(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closing or self._pending_count or self._refusing)
                self._wake.wait_for(lambda: self._closing, timeout=self._flush_interval_s)
                if self._closing:
                    return
            self._flush_or_refuse()

    def _load(self) -> None:
        with self.index.read() as txn:
            machines = list(txn.rows("machines", b"", Machine))
        for machine in machines:
            state = self._load_state(machine)
            self._states[machine.uuid] = state
            if not machine.removing:
                self._names[machine.name] = machine.uuid
        self._flush_or_refuse()

    def _load_state(self, machine: Machine) -> MachineState:
        key = machine.uuid.bytes
        with self.index.read() as txn:
            generations = {row.number: row for row in txn.rows("generations", key, Generation)}
            base = txn.get_row("bases", key, Base)
            tail = txn.get_row("tails", key, Tail)
            number = max(generations)
            tip_entry = next(
                (
                    Entry.unpack(v)
                    for _, v in txn.scan_back("segments", segment_key(machine.uuid, number, SEQ_MAX), key)
                ),
                None,
            )
        tip = generations[number].genesis(machine.uuid)
        if tip_entry is not None and tip_entry.header.generation == number:
            tip = tip_entry.header.position
        else:
            tip_entry = None
        if base is not None and base.target_position.generation == number and base.target_position > tip:
            tip = base.target_position
        state = MachineState(machine, generations, tip, base, tip_entry=tip_entry)
        if tail is not None and not machine.removing:
            self._load_tail(state, tail)
        state.recovery_point = self.find_recovery_point(state)
        return state

    def find_recovery_point(self, state: MachineState) -> Position | None:
        """The newest recovery point of the live lineage. Hold ``writing``."""
        for entry in reversed(state.pending.values()):
            if entry.header.is_recovery_point:
                return entry.header.position
        machine = state.machine.uuid
        with self.index.read() as txn:
            for span in reversed(state.held(state.lineage())):
                prefix = generation_key(machine, span.generation)
                for _, value in txn.scan_back("segments", segment_key(machine, span.generation, span.last + 1), prefix):
                    header = Entry.unpack(value).header
                    if header.seq < span.first:
                        break
                    if header.is_recovery_point:
                        return header.position
        in_lineage = state.base is not None and any(state.base.target_position in span for span in state.lineage())
        return state.base.target_position if state.base is not None and in_lineage else None

    def _load_tail(self, state: MachineState, tail: Tail) -> None:
        file = self.pool.row(tail.file)
        assert file is not None and file.machine == state.machine.uuid
        path = self.pool.path(tail.file)
        try:
            with opened(self.files, path) as handle:
                scanned = scan_tail(self.files, handle, file, tail.end, state.tip)
            state.handle = self.files.open(path, write=True)
        except OSError as error:
            raise StoreFailed(f"{path.name} cannot be read: {error}.", remedy="Check the store's disk.") from error
        state.file, state.end, state.file_segments = file, tail.end, tail.segments
        for entry in scanned.entries:
            state.pending[entry.header.seq] = entry
            state.tip, state.tip_entry = entry.header.position, entry
        self._pending_count += len(scanned.entries)
        state.end = scanned.end
        state.file_segments += len(scanned.entries)
        if scanned.lost_from is not None:
            state.lost_after = state.tip
            # What rotted must not be judged again: go on in a file without such leftovers.
            self.roll_file(state, ALIGN_BYTES)
        state.check()

    def _let_go(self) -> None:
        for state in self._states.values():
            if state.handle >= 0:
                self.files.close(state.handle)
                state.handle = -1
        self.index.close()
        os.close(self._lock_handle)


def _check_index_is_there(directory: Path) -> None:
    """An empty index knows no segment file, and files that no row knows are deleted."""
    if not (directory / "index" / "data.mdb").exists() and any((directory / "segments").glob("*.seg")):
        raise IndexDamaged(
            f"{directory} has segment files, but no index.",
            remedy="Put the catalogue back: 'cdp store restore'. Nothing was changed.",
        )


def _lock(directory: Path) -> int:
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        if not (directory / "LOCK").exists() and any(directory.iterdir()):
            raise StoreFormatUnknown(
                f"{directory} is neither empty nor a store.", remedy="Name the store's directory, or an empty one."
            )
        handle = os.open(directory / "LOCK", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        sync_directory(directory)
    except OSError as error:
        raise StoreFailed(
            f"{directory} cannot be used as a store: {error}.", remedy="Check the path and its owner."
        ) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise StoreLocked(
            f"Another process has the store {directory} open.", remedy="Stop it first: a store has one writer."
        ) from error
    return handle


def _tail(state: MachineState) -> Tail:
    assert state.file is not None
    return Tail(file=state.file.number, end=state.end, segments=state.file_segments)


def _commit_entries(txn: Writer, machine: uuid.UUID, entries: list[Entry], tail: Tail) -> None:
    """Index pending ``entries`` of the file of ``tail``. Somebody else may have committed some of them, and removed
    them again, since they were listed: the row of the file tells."""
    known = txn.get_row("tails", machine.bytes, Tail)
    if known is None or known.file != tail.file or known.end >= tail.end:
        return
    new = [entry for entry in entries if entry.offset >= known.end]
    for entry in new:
        header = entry.header
        txn.put("segments", segment_key(machine, header.generation, header.seq), entry.pack())
        txn.put("times", time_key(machine, header), bytes([header.flags]))
    tally.added(txn, machine, new)
    txn.put_row("tails", machine.bytes, tail)
