"""How soon the raw spool is looked at again within a second, so that a burst is not sealed only at its end."""

from __future__ import annotations

import time
from typing import Final

from cdp.agent.seal import WINDOW_BYTES

LOOK_S: Final = (0.02, 0.25)


class Pace:
    """``drained``: where the raw spool ends."""

    def __init__(self, drained: int) -> None:
        self._drained = drained
        self._at_s = time.monotonic()

    def look_s(self, drained: int) -> float:
        """About until a window is full, at the rate since the last call."""
        came, took_s = drained - self._drained, time.monotonic() - self._at_s
        self._drained, self._at_s = drained, self._at_s + took_s
        if came <= 0:
            return LOOK_S[1]
        return min(max(LOOK_S[0], took_s * WINDOW_BYTES / came), LOOK_S[1])
