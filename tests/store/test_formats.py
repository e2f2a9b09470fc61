"""A store that an earlier version wrote is opened, served, verified, written to and folded by this one.

``formats/store-N.tar.zst`` were written by ``formats/write_store.py`` with the code of their time, ``store-1`` at
commit c75cb9a, ``store-2`` at f4b2847. They are never written again; a change of the format adds one.
"""

from __future__ import annotations

import io
import json
import tarfile
import uuid
from pathlib import Path
from typing import Any

import pytest
import zstandard
from blake3 import blake3

from cdp.store import ImageReader, Store, verify
from cdp.store.errors import StoredDamage, UnknownPosition
from cdp.store.record import RECORD_HEADER_BYTES, SUM_BYTES
from journal.encoder import Encoder
from journal.extent import Extents, Kind
from journal.position import Position
from tests.store.formats.write_store import NOW_NS
from tests.store.source import SECOND_NS
from tests.store.test_damage import flip

FORMATS = sorted((Path(__file__).parent / "formats").glob("*.tar.zst"))


def unpacked(packed: Path, directory: Path) -> dict[str, Any]:
    raw = zstandard.ZstdDecompressor().decompress(packed.read_bytes(), max_output_size=1 << 28)
    with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
        archive.extractall(directory)
    manifest: dict[str, Any] = json.loads((directory / "manifest.json").read_text())
    return manifest


def digests(store: Store, machine: uuid.UUID, position: Position, sizes: list[int]) -> list[str]:
    with ImageReader(store, machine, position) as image:
        found = []
        for disk, size in enumerate(sizes):
            content = b"".join(image.read(disk, at, min(4 << 20, size - at)) for at in range(0, size, 4 << 20))
            found.append(blake3(content).hexdigest())
        return found


@pytest.mark.parametrize("packed", FORMATS, ids=lambda path: path.name.partition(".")[0])
def test_a_store_of_an_earlier_version(tmp_path: Path, packed: Path) -> None:
    manifest = unpacked(packed, tmp_path)
    for opening in range(2):
        with Store.open(tmp_path / "store", file_bytes=1 << 20, map_bytes=64 << 20, clock_ns=lambda: NOW_NS) as store:
            assert [machine.name for machine in store.list_machines()] == ["db1", "web1"]
            for told in manifest["machines"]:
                machine = uuid.UUID(told["uuid"])
                check_history(store, machine, told, added=opening)
                assert verify(store, machine).clean
                go_on(store, machine, opening)
            db1 = store.machine("db1").uuid
            check_ledger(store, db1, manifest)
    with Store.open(tmp_path / "store", file_bytes=1 << 20, map_bytes=64 << 20) as store:
        for told in manifest["machines"]:
            machine = uuid.UUID(told["uuid"])
            store.remove_cursor(machine, "standby")
            assert store.retain(machine, keep_ns=0, now_ns=2 * NOW_NS).folded_to is not None
            assert verify(store, machine).clean
            store.remove_machine(machine)
        assert store.list_machines() == []


@pytest.mark.parametrize("packed", FORMATS, ids=lambda path: path.name.partition(".")[0])
def test_what_rots_in_it_is_found_and_not_served(tmp_path: Path, packed: Path) -> None:
    manifest = unpacked(packed, tmp_path)
    told = manifest["machines"][1]
    machine, tip = uuid.UUID(told["uuid"]), Position.parse(told["tip"])
    with Store.open(tmp_path / "store", file_bytes=1 << 20, map_bytes=64 << 20, clock_ns=lambda: NOW_NS) as store:
        entry = store.entry(store.state(machine), tip.generation, tip.seq)
        assert entry is not None and entry.header.frame_count == 1
        frame_at = entry.offset + RECORD_HEADER_BYTES + entry.header.segment_bytes - 1
        for at in (frame_at, frame_at + 1, frame_at + 1 + SUM_BYTES):  # the frame, its sum, the sum of sums
            flip(store.pool.path(entry.file), at)
            assert [damage.position for damage in verify(store, machine).damages] == [str(tip)]
            with ImageReader(store, machine, tip) as image, pytest.raises(StoredDamage):
                image.read(0, 0, 64 << 10)
            flip(store.pool.path(entry.file), at)
        assert verify(store, machine).clean
        assert digests(store, machine, tip, told["sizes"]) == told["points"][str(tip)]


def check_history(store: Store, machine: uuid.UUID, told: dict[str, Any], added: int) -> None:
    history = store.recovery_points(machine, 0, NOW_NS)
    assert [point.position for point in history.points] == list(told["points"])
    assert [[gap.start_ns, gap.end_ns] for gap in history.fuzzy] == told["fuzzy"]
    assert store.live(machine).seq == Position.parse(told["tip"]).seq + added
    for position, expected in list(told["points"].items())[-3 if added else 0 :]:
        assert digests(store, machine, Position.parse(position), told["sizes"]) == expected


def go_on(store: Store, machine: uuid.UUID, second: int) -> None:
    """One more second, on what the other version wrote."""
    data = bytes([second + 1]) * 4096
    at_ns = NOW_NS + second * SECOND_NS
    _, raw = Encoder(machine).encode(
        store.live(machine),
        Extents.from_rows([(0, 8192, 4096, Kind.DATA)]),
        [data],
        opened_at_ns=at_ns,
        sealed_at_ns=at_ns + SECOND_NS,
        sealed_monotonic_ns=at_ns + SECOND_NS,
    )
    position, _ = store.put_segment(machine, raw)
    with ImageReader(store, machine, position) as image:
        assert image.read(0, 8192, 4096) == data


def check_ledger(store: Store, db1: uuid.UUID, manifest: dict[str, Any]) -> None:
    bookmark = store.bookmark(db1, "before")
    assert bookmark.note == "a note" and bookmark.consistent
    assert store.is_recovery_point(db1, Position.parse(bookmark.position))
    assert store.cursor(db1, "standby") is not None
    assert len(store.generations(db1)) == 2
    assert store.load_takeovers() == {"t1": b"record"}
    assert store.settings.get("spec") == b"value"
    assert store.credentials.get("c1") == b"hash" and store.tokens.get("k1") == b"hash"
    assert [entry.action for entry in store.audit_log()][-1] == "protect"
    assert not store.contains(db1, Position.parse(manifest["dead"]))
    assert store.header(db1, Position.parse(manifest["dead"])).seq
    with pytest.raises(UnknownPosition):
        store.header(db1, Position(1, 2, bytes(32)))
