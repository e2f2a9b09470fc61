"""``cdp bookmark`` against a real server: names are given to seconds, found again, kept and taken away."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.source import BLOCK, Source
from tests.harness.site import Site, running_site


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with running_site(tmp_path) as site:
        yield site


def test_a_second_gets_a_name_and_is_found_by_it(site: Site, tmp_path: Path) -> None:
    source = Source(site, "db1")
    source.protect()
    start = time.time() - 20
    for second in range(5):
        source.write(start + second, {0: bytes([second + 1]) * BLOCK})

    made = site.json("bookmark", "add", "db1", "third", "--at", f"@{start + 2.5}", "--hold", "--note", "ticket 7")
    assert (made["consistency"], made["hold"], made["note"]) == ("crash", True, "ticket 7")
    assert made["sealed_at_s"] == pytest.approx(start + 2)
    assert site.json("bookmark", "list", "db1") == [made]
    shown = site.cdp("bookmark", "list", "db1").stdout
    assert "third" in shown and "held" in shown and "ticket 7" in shown
    site.cdp("recover", "db1", "--bookmark", "third", "-o", str(tmp_path / "third.raw"))
    assert (tmp_path / "third.raw").read_bytes()[:BLOCK] == bytes([3]) * BLOCK

    assert "released" in site.cdp("bookmark", "hold", "db1", "third", "--release").stdout
    assert not site.json("bookmark", "list", "db1")[0]["hold"]
    assert "already" in site.cdp("bookmark", "add", "db1", "third", "--at", f"@{start}", code=1).stderr
    assert "no bookmark" in site.cdp("bookmark", "remove", "db1", "fourth", code=1).stderr
    assert "so early" in site.cdp("bookmark", "add", "db1", "old", "--at", "@1000", code=1).stderr
    site.cdp("bookmark", "add", "db1", "odd", "--at", "sometime", code=2)
    # The agent is away: the present cannot be named now, but may be later.
    assert "not connected" in site.cdp("bookmark", "add", "db1", "now", "--timeout", "1", code=6).stderr
    site.cdp("bookmark", "remove", "db1", "third")
    assert site.json("bookmark", "list", "db1") == []
