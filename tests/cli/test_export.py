"""``cdp export`` as a process, in front of a real server, read by what people read NBD with."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cli.source import BLOCK, DISK_BYTES, Source
from tests.harness.site import Site, running_site

SECONDS = 30


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with running_site(tmp_path_factory.mktemp("site")) as site:
        yield site


@pytest.fixture(scope="module")
def source(site: Site) -> Source:
    source = Source(site, "db1")
    source.protect()
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"seed {seed}")
    rng = random.Random(seed)
    start = time.time() - 100
    for second in range(SECONDS):
        blocks = rng.sample(range(DISK_BYTES // BLOCK // 2), 60)
        source.write(start + second, {block * BLOCK: rng.randbytes(BLOCK) for block in blocks})
    return source


@contextmanager
def exported(site: Site, *words: str) -> Iterator[dict[str, Any]]:
    """What the command told, until it is ended as people end it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cdp.cli.main", "export", "db1", "--json", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=site.env,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        text = ""
        while not text.endswith("}\n") or text.count("{") != text.count("}"):
            line = process.stdout.readline()
            assert line, process.stderr.read()
            text += line
        yield json.loads(text)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert process.stderr.read() == "ended\n"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def run(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout


def test_any_second_is_read_over_nbd_while_ingest_goes_on(site: Site, source: Source, tmp_path: Path) -> None:
    at_s, image = source.history[7]
    with exported(site, "--at", f"@{at_s + 0.5}") as told:
        assert told["sealed_at_s"] == pytest.approx(at_s)
        uri = told["uris"]["vda"]
        run("nbdcopy", uri, str(tmp_path / "copied"))
        assert (tmp_path / "copied").read_bytes() == image
        source.write(time.time() - 50, {0: b"x" * BLOCK, BLOCK * 9: b"y" * BLOCK})
        run("qemu-img", "convert", "-f", "raw", "-O", "raw", uri, str(tmp_path / "converted"))
        assert (tmp_path / "converted").read_bytes() == image
        used = (tmp_path / "converted").stat().st_blocks * 512
        assert used <= DISK_BYTES - image.count(bytes(BLOCK)) * BLOCK + (1 << 20), "qemu-img stays sparse"
        extents = json.loads(run("nbdinfo", "--map", "--json", uri))
        assert sum(one["length"] for one in extents if one["type"] == 3) > DISK_BYTES // 2
        assert (
            json.loads(run("nbdinfo", "--list", "--json", uri.replace("/vda", "/")))["exports"][0]["export-name"]
            == "vda"
        )


def test_a_copy_on_write_overlay_runs_on_it(site: Site, source: Source, tmp_path: Path) -> None:
    at_s, image = source.history[11]
    overlay = tmp_path / "overlay.qcow2"
    socket = tmp_path / "socket"
    with exported(site, "--at", f"@{at_s}", "--listen", f"unix:{socket}", "--disk", "0") as told:
        assert told["uris"]["vda"] == f"nbd+unix:///vda?socket={socket}"
        run("qemu-img", "create", "-f", "qcow2", "-F", "raw", "-b", told["uris"]["vda"], str(overlay))
        run("qemu-io", "-c", "write -P 7 1M 64k", str(overlay))
        run("qemu-img", "convert", "-O", "raw", str(overlay), str(tmp_path / "raw"))
    changed = bytearray(image)
    changed[1 << 20 : (1 << 20) + (64 << 10)] = b"\7" * (64 << 10)
    assert (tmp_path / "raw").read_bytes() == changed
    assert not socket.exists()


def test_small_random_reads_are_right_and_a_restart_of_the_server_is_waited_for(
    site: Site, source: Source, tmp_path: Path
) -> None:
    at_s, image = source.history[-2]
    rng = random.Random(5)
    with exported(site, "--at", f"@{at_s}") as told:
        commands = []
        for number in range(40):
            offset = rng.randrange(DISK_BYTES - 70_000) // 512 * 512
            commands += ["-c", f"read -q {offset} {rng.choice((512, 4096, 65536))}"]
            if number == 20:
                site.stop(kill=True)
                site.start()
        run("qemu-io", "-f", "raw", "-r", *commands, told["uris"]["vda"])
        run("nbdcopy", told["uris"]["vda"], str(tmp_path / "copied"))
    assert (tmp_path / "copied").read_bytes() == image
    assert [line["action"] for line in site.json("audit")].count("export") >= 2


def test_what_cannot_be_exported_is_told(site: Site, source: Source, tmp_path: Path) -> None:
    early = site.cdp("export", "db1", "--at", "@1000", code=1).stderr
    assert "so early" in early
    assert "The nearest: 20" in early
    assert "no bookmark" in site.cdp("export", "db1", "--bookmark", "none", code=1).stderr
    assert "no disk" in site.cdp("export", "db1", "--disk", "9", code=1).stderr
    site.cdp("export", "db1", "--at", "-1m", "--latest", code=2)
    site.cdp("export", "db1", "--listen", "nowhere", code=2)
    taken = tmp_path / "taken"
    taken.mkdir()
    assert "nbdkit has failed" in site.cdp("export", "db1", "--listen", f"unix:{taken}", code=1).stderr
    path = site.env["PATH"]
    site.env["PATH"] = str(tmp_path)
    try:
        assert "packages nbdkit" in site.cdp("export", "db1", code=1).stderr
    finally:
        site.env["PATH"] = path


def test_recover_by_bookmark_into_a_directory_and_read_back(site: Site, source: Source, tmp_path: Path) -> None:
    at_s, image = source.history[5]
    site.cdp("bookmark", "add", "db1", "before-upgrade", "--at", f"@{at_s}")
    (told,) = site.json("recover", "db1", "--bookmark", "before-upgrade", "-o", str(tmp_path), "--verify")
    assert told["verified"] is True
    assert told["output"] == str(tmp_path / "db1-vda.raw")
    assert (tmp_path / "db1-vda.raw").read_bytes() == image
    found = site.json("points", "db1", "--from", "-1h")
    assert [one["name"] for one in found["bookmarks"]] == ["before-upgrade"]
    assert "before-upgrade" in site.cdp("points", "db1", "--limit", "100").stdout
    assert "there are more" in site.cdp("points", "db1", "--limit", "3").stdout
    assert "no bookmark" in site.cdp("recover", "db1", "--bookmark", "x", "-o", str(tmp_path / "x"), code=1).stderr


def test_an_interrupted_recovery_begins_anew_and_two_do_not_write_one_file(
    site: Site, source: Source, tmp_path: Path
) -> None:
    partial = tmp_path / ".out.raw.partial"
    partial.write_bytes(b"what a killed command left" * 1000)
    with partial.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        refused = site.cdp("recover", "db1", "-o", str(tmp_path / "out.raw"), code=1)
        assert "Another command writes" in refused.stderr
        assert partial.exists()
    site.cdp("recover", "db1", "-o", str(tmp_path / "out.raw"))
    assert (tmp_path / "out.raw").read_bytes() == bytes(source.image)
    assert [path.name for path in tmp_path.iterdir()] == ["out.raw"]
