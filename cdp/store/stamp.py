"""What the files of a base image hold, written beside them, so that an older copy of the index is noticed.

The index says what the base image is (``Base``). A restored one may be older than the files; what it offers between
its own position and theirs would be wrong without anybody knowing. The stamp is written before a fold touches a file,
and again when the fold is committed, before the first segment of it is removed:

    stamp                    the files
    target = folded          are exactly that position
    target, folded before    lie between the two; all segments between them are still there: fold again
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec
from blake3 import blake3

from cdp.store.files import Files, opened
from cdp.store.records import Base

NAME: Final = "stamp"
_SUM_BYTES: Final = 16
_BYTES_MAX: Final = 4096


def write_stamp(files: Files, directory: Path, base: Base) -> None:
    """Durable on return. Raises ``OSError``."""
    body = msgspec.msgpack.encode(base)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = directory / f"{NAME}.new"
    files.create_sparse(new, 0)
    with opened(files, new, write=True) as handle:
        files.write(handle, [blake3(body).digest(_SUM_BYTES) + body], 0)
        files.sync(handle)
    files.replace(new, directory / NAME)


def read_stamp(files: Files, directory: Path) -> Base | None:
    """None: there is none, or it is damaged (it is only looked at when a store was restored). Raises ``OSError``."""
    if not (directory / NAME).exists():
        return None
    with opened(files, directory / NAME) as handle:
        raw = files.read(handle, _BYTES_MAX, 0)
    if blake3(raw[_SUM_BYTES:]).digest(_SUM_BYTES) != raw[:_SUM_BYTES]:
        return None
    return msgspec.msgpack.decode(raw[_SUM_BYTES:], type=Base)
