from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cdp.store import Store
from tests.store.source import SCRATCH


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory where possible: these tests sync thousands of times, and what a lost sync does is told by
    ``FaultyFiles``, not by the disk."""
    path = Path(tempfile.mkdtemp(prefix="cdp-store-test-", dir=SCRATCH))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store", file_bytes=1 << 20, map_bytes=64 << 20) as opened:
        yield opened
