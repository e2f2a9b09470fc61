"""One captured piece of a bio as a numpy structure. ``layout`` draws it byte by byte."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cdp.agent.capture.layout import ABANDONED, DISCARDED, LAST, PAYLOAD_BYTES, RECORD_BYTES

RECORD = np.dtype(
    [
        ("ring_length", "<u4"),
        ("ring_page", "<u4"),
        ("bio", "<u8"),
        ("drop_generation", "<u8"),
        ("offset", "<u8"),
        ("length", "<u8"),
        ("submitted_ns", "<u8"),
        ("disk", "<u2"),
        ("op", "u1"),
        ("flags", "u1"),
        ("reserved", "V20"),
        ("payload", "u1", (PAYLOAD_BYTES,)),
    ]
)
assert RECORD.itemsize == RECORD_BYTES

Records = npt.NDArray[np.void]
"""An array of RECORD."""


def without_discarded(records: Records) -> Records:
    """The records without those that the kernel side gave back; a view if there are none."""
    given_back = (records["ring_length"] & np.uint32(DISCARDED)) != 0
    return records[~given_back] if given_back.any() else records


def is_last(records: Records) -> npt.NDArray[np.bool_]:
    return np.asarray((records["flags"] & np.uint8(LAST)) != 0)


def is_abandoned(records: Records) -> npt.NDArray[np.bool_]:
    return np.asarray((records["flags"] & np.uint8(ABANDONED)) != 0)
