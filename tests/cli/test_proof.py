"""``cdp verify``, ``cdp compare``, ``cdp store``: a server as a process, exit codes, JSON."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cdp.store.record import ALIGN_BYTES, MAGIC, RECORD_HEADER_BYTES
from journal.segment import HEADER_BYTES
from tests.cli.source import BLOCK, Source
from tests.harness.site import Site, running_site
from tests.store.test_damage import flip

SECONDS = 6


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with running_site(tmp_path) as site:
        yield site


def test_from_a_clean_store_over_a_flipped_byte_to_a_restore(site: Site, tmp_path: Path) -> None:
    source = Source(site, "db1")
    source.protect()
    start = time.time() - 60
    for second in range(SECONDS):
        source.write(start + second, {BLOCK * second: bytes([second + 1]) * BLOCK})
    config = ("--config", str(site.config))

    assert "--last" in site.cdp("verify", "db1", "--last", code=1).stderr
    assert site.json("verify", "db1")["segments"] == SECONDS
    assert site.json("verify", "db1", "--last")["success"]
    assert "agent" in site.cdp("compare", "db1", code=1).stderr
    site.cdp("store", "backup", str(tmp_path / "backup"), *config)
    assert site.json("store", "check", *config)["problems"] == []
    assert "exists" in site.cdp("store", "backup", str(tmp_path / "backup"), *config, code=1).stderr

    segment = next((tmp_path / "state" / "store" / "segments").glob("*.seg"))
    second = segment.read_bytes().index(MAGIC, ALIGN_BYTES)
    flip(segment, second + RECORD_HEADER_BYTES + HEADER_BYTES - 1)
    damaged = site.cdp("verify", "db1", code=1)
    assert "1 damages were found" in damaged.stderr and "1/2 is damaged" in damaged.stdout
    assert "1 damages" in site.cdp("status", "db1").stdout
    assert "written anew" in site.cdp("verify", "db1", "--repair", code=1).stdout
    site.cdp("verify", "db1")

    assert "running" in site.cdp("store", "restore", str(tmp_path / "backup"), *config, code=1).stderr
    source.write(start + SECONDS, {0: b"x" * BLOCK})
    site.stop()
    adopted = site.json("store", "restore", str(tmp_path / "backup"), *config)
    assert [(one["machine"], one["tip"]) for one in adopted] == [("db1", f"1/{SECONDS + 1}")]
    site.start()
    assert site.json("status", "db1")["stages"][2]["position"].endswith(str(source.writer.tip)[-64:])
