"""The control map, shared with the BPF program: one page of u64 fields (``struct control``)."""

from __future__ import annotations

import mmap
from enum import IntEnum

CONTROL_BYTES = 1024
_CAUSES = 16

_ABI = 0
_CAPTURE_ID = 1
_VMEMMAP = 2
_PAGE_OFFSET = 3
_WAKE_BYTES = 4
_GENERATION = 8
_STAMPED = 9
_WIDE_EVENTS = 10
_WIDE_HANDLED = 24
_MISSED_HANDLED = 25
_LOST_EVENTS = 32
_LOST_BYTES = 48
_WHOLE = 64


class Cause(IntEnum):
    """Why a write is not in the journal. The first seven are the kernel side's."""

    RING_FULL = 0
    UNREADABLE_PAGE = 1
    UNKNOWN_OPERATION = 2
    INLINE_ENCRYPTION = 3
    FAILED_WRITE = 4
    FAILED_FLUSH = 5
    PASSTHROUGH = 6
    MISSED_RUN = 7
    """The kernel skipped a run of the program: it was already running on that CPU."""
    REQUESTED = 8
    """The agent or a person asked for it."""

    @property
    def label(self) -> str:
        """For metrics and messages, as in ``ring-full``."""
        return self.name.lower().replace("_", "-")


class Control:
    """A writable view. Kernel-side fields only ever grow; ``wide_handled`` and ``missed_handled`` are the session's."""

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, mmap.PAGESIZE)
        self._words = memoryview(self._map).cast("Q")

    def close(self) -> None:
        self._words.release()
        self._map.close()

    @staticmethod
    def initial(abi: int, capture_id: int, vmemmap: int, page_offset: int, wake_bytes: int) -> bytes:
        """The map's value for a new capture."""
        words = [0] * (CONTROL_BYTES // 8)
        words[_ABI] = abi
        words[_CAPTURE_ID] = capture_id
        words[_VMEMMAP] = vmemmap
        words[_PAGE_OFFSET] = page_offset
        words[_WAKE_BYTES] = wake_bytes
        return b"".join(word.to_bytes(8, "little") for word in words)

    @property
    def abi(self) -> int:
        return self._words[_ABI]

    @property
    def capture_id(self) -> int:
        return self._words[_CAPTURE_ID]

    @property
    def generation(self) -> int:
        return self._words[_GENERATION]

    @property
    def stamped(self) -> int:
        return self._words[_STAMPED]

    @property
    def wide_events(self) -> int:
        return self._words[_WIDE_EVENTS]

    @property
    def wide_handled(self) -> int:
        return self._words[_WIDE_HANDLED]

    @wide_handled.setter
    def wide_handled(self, value: int) -> None:
        self._words[_WIDE_HANDLED] = value

    @property
    def missed_handled(self) -> int:
        return self._words[_MISSED_HANDLED]

    @missed_handled.setter
    def missed_handled(self, value: int) -> None:
        self._words[_MISSED_HANDLED] = value

    def whole(self, disk: int) -> int:
        """Generation of the last wide loss of the disk."""
        return self._words[_WHOLE + disk]

    def lost_events(self) -> list[int]:
        return self._words[_LOST_EVENTS : _LOST_EVENTS + _CAUSES].tolist()

    def lost_bytes(self) -> list[int]:
        return self._words[_LOST_BYTES : _LOST_BYTES + _CAUSES].tolist()
