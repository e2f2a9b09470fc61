"""Rows 1, 2, 3, … committed one after another, and which of them were acknowledged when."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self


class AckedRows:
    """``commit(n)`` returns once row n is committed. The rows of any image are 1..k; k is at least ``acked`` as read
    before the image, and at most one more than read after it. Ends with the first error, which ``check`` raises."""

    def __init__(self, commit: Callable[[int], None]) -> None:
        self.acked = 0
        self.longest_s = 0.0
        self._commit = commit
        self._ending = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        self._thread.join(30)
        assert not self._thread.is_alive(), "a commit has been hanging for 30 s"

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while not self._ending.is_set():
                began = time.monotonic()
                self._commit(self.acked + 1)
                self.acked += 1
                self.longest_s = max(self.longest_s, time.monotonic() - began)
        except Exception as error:
            self._error = error
