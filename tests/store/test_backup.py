"""The catalogue is copied under a running store, and put back on top of the files as they have become since."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from cdp.store import Store, verify
from cdp.store.adopt import Adopted
from cdp.store.backup import BackupFailed, Checked, check, restore
from cdp.store.errors import IndexDamaged, StoreLocked
from journal.position import Position
from tests.store.source import SECOND_NS, Source, make
from tests.store.test_damage import flip

SIZE = 256 << 10
FILE_BYTES = 256 << 10


def opened(directory: Path) -> Store:
    return Store.open(directory / "store", file_bytes=FILE_BYTES, map_bytes=64 << 20, spares_max=2)


@pytest.fixture
def server(tmp_path: Path) -> Path:
    """What a server's directory has beside its store."""
    directory = tmp_path / "server"
    (directory / "tls").mkdir(parents=True)
    (directory / "tls" / "ca.pem").write_text("a key")
    (directory / "operator.json").write_text("{}")
    return directory


def write(store: Store, source: Source, seconds: int, choose: random.Random) -> None:
    for _ in range(seconds):
        source.put(store, source.random_writes())
        if choose.random() < 0.2:
            store.retain(source.machine, keep_ns=8 * SECOND_NS, now_ns=source.seconds * SECOND_NS)


def backed_up(server: Path, target: Path) -> None:
    """In a process of its own, as the command is: the store is open in this one."""
    code = "import sys; from pathlib import Path; from cdp.store.backup import backup; "
    code += "backup(Path(sys.argv[1]), Path(sys.argv[2]), None)"
    subprocess.run([sys.executable, "-c", code, str(server), str(target)], check=True)


def check_all(store: Store, source: Source) -> int:
    assert store.live(source.machine) == source.position
    points = store.recovery_points(source.machine, 0, 2**62).points
    for point in points:
        source.check(store, Position.parse(point.position))
    assert verify(store, source.machine).clean
    return len(points)


@pytest.mark.parametrize("seed", range(4))
def test_everything_that_was_acknowledged_since_is_there_again(tmp_path: Path, server: Path, seed: int) -> None:
    choose = random.Random(seed)
    store = opened(server)
    source, other = make(store, SIZE, seed=seed), make(store, SIZE, name="web1", seed=seed + 100)
    write(store, source, choose.randrange(3, 30), choose)
    write(store, other, 3, choose)
    backed_up(server, tmp_path / "copy")
    write(store, source, choose.randrange(5, 40), choose)
    write(store, other, choose.randrange(30), choose)
    offered = [len(store.recovery_points(one.machine, 0, 2**62).points) for one in (source, other)]
    if seed % 2:
        store.close()
    else:
        store.abandon()
    adopted = restore(tmp_path / "copy", server, map_bytes=64 << 20)
    assert {one.machine for one in adopted} == {"db1", "web1"}
    with opened(server) as store:
        # Exactly what was offered before: nothing is lost, and nothing that was folded comes back.
        assert [check_all(store, one) for one in (source, other)] == offered
        assert store.settings.get(f"reseed/{source.machine}")
        write(store, source, 20, choose)
        check_all(store, source)
    assert list((server / "store").glob("index.before-restore-*"))


def test_a_restore_of_a_restore_changes_nothing(tmp_path: Path, server: Path) -> None:
    choose = random.Random(3)
    with opened(server) as store:
        source = make(store, SIZE)
        write(store, source, 10, choose)
        backed_up(server, tmp_path / "copy")
        write(store, source, 10, choose)
    for _ in range(2):
        restore(tmp_path / "copy", server, map_bytes=64 << 20)
    with opened(server) as store:
        check_all(store, source)


def test_a_restore_needs_a_sound_copy_and_a_stopped_server(tmp_path: Path, server: Path) -> None:
    with opened(server) as store:
        write(store, make(store, SIZE), 5, random.Random(1))
        backed_up(server, tmp_path / "copy")
        with pytest.raises(StoreLocked) as locked:
            restore(tmp_path / "copy", server, map_bytes=64 << 20)
        assert "Stop" in locked.value.remedy
    data = tmp_path / "copy" / "index" / "data.mdb"
    for at in range(8192, data.stat().st_size, 512):
        flip(data, at)
    with pytest.raises(BackupFailed):
        restore(tmp_path / "copy", server, map_bytes=64 << 20)
    with opened(server) as store:
        assert store.list_machines()


def test_a_check_tells_what_is_missing(server: Path) -> None:
    with opened(server) as store:
        write(store, make(store, SIZE), 10, random.Random(1))
    sound = check(server)
    assert sound.problems == [] and sound.machines == 1 and sound.segment_files
    segment = next((server / "store" / "segments").glob("*.seg"))
    segment.unlink()
    (server / "operator.json").unlink()
    problems = check(server).problems
    assert len(problems) == 2 and segment.name in problems[0]


def test_segment_files_without_an_index_are_left_alone(server: Path) -> None:
    with opened(server) as store:
        write(store, make(store, SIZE), 10, random.Random(1))
    before = sorted(path.name for path in (server / "store" / "segments").iterdir())
    (server / "store" / "index").rename(server / "store" / "elsewhere")
    with pytest.raises(IndexDamaged):
        opened(server)
    assert sorted(path.name for path in (server / "store" / "segments").iterdir()) == before


def test_the_answers_are_json() -> None:
    assert msgspec.json.encode(Checked(rows=1, machines=1, segment_files=1, spare_files=0, problems=[]))
    assert msgspec.json.encode(Adopted(machine="db1", tip="1/2", segments=1, files=0))
