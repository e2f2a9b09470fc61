"""The drainer's view of the BPF ring: bytes by position. No numpy here.

    page 0     consumer position, writable      page 1     producer position
    page 2…    data, once (the kernel offers it twice, but a copy can wrap, and mappings count as memory)

Every record is RECORD_BYTES long and starts with a header whose BUSY bit is set until the program has submitted it.
"""

from __future__ import annotations

import mmap

from cdp.agent.capture.layout import BUSY, RECORD_BYTES

_WORDS = RECORD_BYTES // 4


class Ring:
    def __init__(self, fd: int, ring_bytes: int) -> None:
        self.ring_bytes = ring_bytes
        self._consumer = memoryview(mmap.mmap(fd, mmap.PAGESIZE)).cast("Q")
        mapped = mmap.mmap(fd, mmap.PAGESIZE + ring_bytes, prot=mmap.PROT_READ, offset=mmap.PAGESIZE)
        view = memoryview(mapped)
        self._producer = view[: mmap.PAGESIZE].cast("Q")
        self._data = view[mmap.PAGESIZE :]
        self._headers = self._data.cast("I")

    @property
    def producer(self) -> int:
        return self._producer[0]

    @property
    def consumer(self) -> int:
        return self._consumer[0]

    @consumer.setter
    def consumer(self, position: int) -> None:
        """Gives the space below ``position`` back to the kernel."""
        self._consumer[0] = position

    def ready(self, start: int, end: int) -> int:
        """The end of the submitted records in ``[start, end)``: where the first busy one begins, or ``end``."""
        while start < end:
            # A header never wraps: records start at multiples of 8. The stride works up to the end of the data area.
            at = start % self.ring_bytes
            count = min((end - start) // RECORD_BYTES, -(-(self.ring_bytes - at) // RECORD_BYTES))
            headers = self._headers[at // 4 :: _WORDS][:count]
            # The maximum of all words is one call; looking for the busy one is the rare case.
            if max(headers) >= BUSY:
                # By now it may have been submitted.
                busy = next((number for number, header in enumerate(headers) if header >= BUSY), count)
                if busy < count:
                    return start + busy * RECORD_BYTES
            start += count * RECORD_BYTES
        return end

    def pieces(self, start: int, end: int) -> list[memoryview]:
        """The bytes of ``[start, end)``, at most ``ring_bytes`` of them: one piece, or two where they wrap."""
        first, last = start % self.ring_bytes, end % self.ring_bytes
        if first < last:
            return [self._data[first:last]]
        return [self._data[first:], self._data[:last]] if last else [self._data[first:]]
