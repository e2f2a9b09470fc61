from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cdp.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store", file_bytes=1 << 20, map_bytes=64 << 20) as opened:
        yield opened
