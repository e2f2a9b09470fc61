"""``cdp limit`` against a real server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.site import Site, running_site

WINDOW = ("--during", "mon-sun 00:00-24:00", "--time-zone", "Europe/Berlin")


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with running_site(tmp_path) as site:
        yield site


def test_limits_are_set_shown_and_removed(site: Site) -> None:
    site.cdp("machines", "add", "db1")
    site.cdp("limit", "set", "db1", "20MB/s")
    shown = site.json("limit", "set", "--total", "400Mbit/s", *WINDOW)
    assert shown["total_bytes_per_s"] == 50_000_000
    assert shown["total_rules"] == [
        {"bytes_per_s": 50_000_000, "during": "mon-sun 00:00-24:00", "time_zone": "Europe/Berlin"}
    ]
    assert shown["machines"][0]["allowed_bytes_per_s"] == 20_000_000
    table = site.cdp("limit", "show").stdout
    assert "20 MB/s always" in table
    assert "50 MB/s mon-sun 00:00-24:00 Europe/Berlin" in table
    assert "time zone" in site.cdp("limit", "set", "db1", "1MB/s", "--time-zone", "Mars/Base", code=1).stderr
    assert site.json("limit", "remove", "db1")["machines"][0]["allowed_bytes_per_s"] == 50_000_000
    assert site.json("limit", "remove", "--total", "--during", "mon-sun 00:00-24:00")["total_rules"] == []
