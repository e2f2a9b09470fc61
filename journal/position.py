"""A point in the hash chain of segments.

Positions are ordered by ``(generation, seq)``; the digest tells two histories with the same numbers apart. A
generation starts at its *genesis*, the position with ``seq`` 0; its first segment has ``seq`` 1.
"""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass
from functools import total_ordering

from blake3 import blake3

DIGEST_BYTES = 32
GENERATION_MAX = 2**32 - 1
SEQ_MAX = 2**63 - 1

_TEXT = re.compile(r"^([0-9a-f]{8})-([0-9a-f]{16})-([0-9a-f]{64})$")


@total_ordering
@dataclass(frozen=True, slots=True)
class Position:
    """``(generation, seq, digest)``; prints in a fixed width that sorts as the position does."""

    generation: int
    seq: int
    digest: bytes

    def __post_init__(self) -> None:
        if not 1 <= self.generation <= GENERATION_MAX:
            raise ValueError(f"generation {self.generation} is outside 1..{GENERATION_MAX}")
        if not 0 <= self.seq <= SEQ_MAX:
            raise ValueError(f"seq {self.seq} is outside 0..{SEQ_MAX}")
        if len(self.digest) != DIGEST_BYTES:
            raise ValueError(f"a digest has {DIGEST_BYTES} bytes, not {len(self.digest)}")

    def __str__(self) -> str:
        return f"{self.generation:08x}-{self.seq:016x}-{self.digest.hex()}"

    def __lt__(self, other: Position) -> bool:
        return (self.generation, self.seq) < (other.generation, other.seq)

    @property
    def short(self) -> str:
        """For people: ``generation/seq``, as in ``1/4711``."""
        return f"{self.generation}/{self.seq}"

    @property
    def is_genesis(self) -> bool:
        return self.seq == 0

    @classmethod
    def parse(cls, text: str) -> Position:
        """The inverse of ``str``; raises ``ValueError``."""
        match = _TEXT.match(text)
        if match is None:
            raise ValueError(f"{text!r} is not a position (generation-seq-digest in hexadecimal)")
        return cls(int(match[1], 16), int(match[2], 16), bytes.fromhex(match[3]))

    @classmethod
    def genesis(cls, machine: uuid.UUID, generation: int, parent: Position | None) -> Position:
        """Where ``generation`` starts: on top of ``parent`` (rollback, takeover) or of all-zero disks (new seed)."""
        hasher = blake3(b"cdp genesis v1\0")
        hasher.update(machine.bytes)
        hasher.update(generation.to_bytes(8, "little"))
        hasher.update(b"" if parent is None else str(parent).encode())
        return cls(generation, 0, hasher.digest())
