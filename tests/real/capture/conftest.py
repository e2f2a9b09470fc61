from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.real.capture.rig import Rig


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    try:
        yield made
    finally:
        made.close()
