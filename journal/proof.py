"""How an agent asks for chunks that the server may have already: body of ``wire.PREFILL``, entries of 48 bytes.

    u64 number of the chunk on the disk │ first 8 bytes of its blake3 digest │ 32 bytes of proof

The first digest finds a chunk, the proof says that the asker holds it: the digest keyed with what the server drew for
this one beginning. Chunks of zeros, and a last one that is shorter, are not asked for.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

from blake3 import blake3

CHUNK_BYTES: Final = 64 << 10
ENTRIES_MAX: Final = 1024
"""In one request: 48 KiB that stand for 64 MiB."""
KEY_BYTES: Final = 32
_ENTRY: Final = struct.Struct("<QQ32s")
ENTRY_BYTES: Final = _ENTRY.size


def entry(number: int, content: memoryview, key: bytes) -> bytes:
    """For one whole chunk; ``key``: what the server drew."""
    hint = int.from_bytes(blake3(content).digest(8), "little")
    return _ENTRY.pack(number, hint, blake3(content, key=key).digest())


def entries(body: bytes) -> Iterator[tuple[int, int, bytes]]:
    """``(number, hint, proof)``. Raises ``ValueError`` unless they are whole, ascending, and not too many."""
    if len(body) % ENTRY_BYTES or len(body) > ENTRIES_MAX * ENTRY_BYTES:
        raise ValueError(f"{len(body)} bytes are not 0 to {ENTRIES_MAX} entries")
    last = -1
    for number, hint, proof in _ENTRY.iter_unpack(body):
        if number <= last:
            raise ValueError(f"chunk {number} comes after chunk {last}")
        last = number
        yield number, hint, proof
