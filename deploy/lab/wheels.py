"""The agent as a user gets it: a wheel of this tree and a wheelhouse of what it depends on.

The wheelhouse changes only with pyproject.toml, the wheel with every edit; both are made by pip, so its configured
indexes and caches apply.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Callable
from pathlib import Path

from deploy.lab.programs import run

REPOSITORY = Path(__file__).parents[2]
WHEELHOUSE = REPOSITORY / "build" / "wheelhouse"

_PIP_DEADLINE_S = 900.0


def wheelhouse(progress: Callable[[str], None]) -> Path:
    """A directory with the wheels of the project's base dependencies."""
    dependencies = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    key = hashlib.sha256(repr((dependencies, sys.version_info[:2])).encode()).hexdigest()[:16]
    stamp = WHEELHOUSE / "key"
    if not stamp.exists() or stamp.read_text() != key:
        progress("collecting the agent's dependencies")
        shutil.rmtree(WHEELHOUSE, ignore_errors=True)
        WHEELHOUSE.mkdir(parents=True)
        _pip("wheel", "--wheel-dir", str(WHEELHOUSE), *dependencies)
        stamp.write_text(key)
    return WHEELHOUSE


def own_wheel(out_dir: Path) -> Path:
    """Build this tree's wheel into ``out_dir``."""
    out_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir) as scratch:
        _pip("wheel", "--no-deps", "--wheel-dir", scratch, str(REPOSITORY))
        (built,) = Path(scratch).glob("*.whl")
        return built.replace(out_dir / built.name)


def _pip(*arguments: str) -> None:
    run([sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments], deadline_s=_PIP_DEADLINE_S)
