"""Writes a small store with whatever is in it, packed, with a manifest of what must be read from it.

Run with the code of the version whose format is to be kept, in a checkout of it:

    python -m tests.store.formats.write_store store-VERSION.tar.zst
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import zstandard
from blake3 import blake3

from cdp.store import Store
from journal.extent import Kind
from journal.position import Position
from journal.segment import Flags
from tests.store.source import SECOND_NS, Source, make

SIZES = [192 << 10, 64 << 20]
NOW_NS = 100 * SECOND_NS


def fill(store: Store) -> dict[str, Any]:
    """Two machines: one with a folded base image, a fuzzy interval, a run file, and a takeover's second generation;
    and one that is only a genesis and three seconds."""
    first = make(store, *SIZES, name="db1", seed=11)
    for at in range(10):
        first.put(store, small_writes(first, at))
    store.set_cursor(first.machine, "standby", first.position)
    store.retain(first.machine, keep_ns=6 * SECOND_NS, now_ns=10 * SECOND_NS)
    for number in range(4):
        # Discards are many extents in few bytes: enough of them for a run file.
        writes = [(1, 2048 * at + 512 * number, 512, Kind.DISCARD) for at in range(16_500)]
        first.put(store, [(0, 4096 * number, 4096, Kind.DATA), *writes])
    first.check(store, first.position)
    first.put(store, small_writes(first, 20), Flags.FUZZY)
    cut = first.put(store, small_writes(first, 21))
    store.add_bookmark(first.machine, "before", cut, "a note", consistency="application")
    dead = first.put(store, small_writes(first, 22))
    first.branch(store, cut, "takeover")
    first.put(store, small_writes(first, 23))
    second = make(store, 64 << 10, name="web1", seed=12)
    for at in range(3):
        second.put(store, [(0, 4096 * at, 8192, Kind.DATA)])
    store.save_takeover("t1", b"record")
    store.settings.put("spec", b"value")
    store.credentials.put("c1", b"hash")
    store.tokens.put("k1", b"hash")
    store.audit("operator", "protect", "db1", {"why": "test"})
    base = store.state(first.machine).base
    assert base is not None
    return {
        "dead": str(dead),
        "base": base.target,
        "machines": [told(store, first), told(store, second)],
    }


def small_writes(source: Source, second: int) -> list[tuple[int, int, int, int]]:
    writes = [write for write in source.random_writes(4) if write[0] == 0]
    return [*writes, (1, (second % 16) * (4 << 20), 4096, Kind.DATA)]


def told(store: Store, source: Source) -> dict[str, Any]:
    """What can be recovered, and what it holds."""
    history = store.recovery_points(source.machine, 0, NOW_NS)
    points = {
        point.position: [blake3(disk).hexdigest() for disk in source.images[Position.parse(point.position)]]
        for point in history.points
    }
    return {
        "uuid": str(source.machine),
        "name": store.machine(source.machine).name,
        "sizes": source.sizes,
        "tip": str(store.live(source.machine)),
        "fuzzy": [[gap.start_ns, gap.end_ns] for gap in history.fuzzy],
        "points": points,
    }


def pack(directory: Path, manifest: dict[str, Any]) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        archive.add(directory, "store")
        body = json.dumps(manifest, indent=1).encode()
        info = tarfile.TarInfo("manifest.json")
        info.size = len(body)
        archive.addfile(info, io.BytesIO(body))
    return zstandard.ZstdCompressor(level=19).compress(raw.getvalue())


def main(out: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "store"
        with Store.open(directory, file_bytes=1 << 20, map_bytes=64 << 20, clock_ns=lambda: NOW_NS) as store:
            manifest = fill(store)
        out.write_bytes(pack(directory, manifest))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
