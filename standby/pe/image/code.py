"""The two Python layers: distributions out of the environment that builds, and our own code.

The distributions come from the running environment, not from the network: what the server was tested with is what the
PE runs. That needs the environment's Python to be the PE's (checked), and its wheels to be plain Linux x86-64 ones.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from standby.pe.image.bytecode import add_bytecode
from standby.pe.image.cpio import CpioWriter
from standby.pe.image.errors import ImageToolMissing
from standby.pe.image.recipe import (
    CODE_LEFT_OUT,
    CODE_PACKAGES,
    DISTRIBUTION_PARTS_LEFT_OUT,
    DISTRIBUTION_SUFFIXES_LEFT_OUT,
    DISTRIBUTIONS,
    PYTHON,
    RECIPE_VERSION,
)

_PACKAGES_ROOT = "opt/cdp/packages"
_CODE_ROOT = "opt/cdp/code"


def check_interpreter() -> None:
    """Refuse to build with a Python whose bytecode and extension modules the PE's Python cannot load."""
    if sys.version_info[:2] != PYTHON:
        raise ImageToolMissing(
            f"The PE carries Python {PYTHON[0]}.{PYTHON[1]}, but this is {sys.version_info[0]}.{sys.version_info[1]}.",
            remedy=f"Run `cdp pe build` in an environment made with python{PYTHON[0]}.{PYTHON[1]} (Debian 12 has it).",
        )


def distributions_key() -> str:
    """16 hexadecimal digits over the names and versions of the distributions that the PE carries."""
    versions = [f"{name}={distribution(name).version}" for name in DISTRIBUTIONS]
    text = f"{RECIPE_VERSION} {versions} {DISTRIBUTION_PARTS_LEFT_OUT} {DISTRIBUTION_SUFFIXES_LEFT_OUT}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_distributions(cpio: CpioWriter) -> None:
    """Add the files of all DISTRIBUTIONS, without what only development needs."""
    for name in DISTRIBUTIONS:
        held = distribution(name)
        for file in sorted(held.files or (), key=str):
            path = str(file)
            if not _is_left_out(path):
                _add(cpio, f"{_PACKAGES_ROOT}/{path}", Path(str(held.locate_file(file))).read_bytes())


def code_key() -> str:
    """16 hexadecimal digits over the content of our own code and of init."""
    digest = hashlib.sha256(str(RECIPE_VERSION).encode())
    for path, data in _code():
        digest.update(f"{path} {len(data)}\n".encode() + data)
    digest.update(_init())
    return digest.hexdigest()[:16]


def write_code(cpio: CpioWriter) -> None:
    """Add init and our packages."""
    cpio.file("init", _init(), 0o755)
    for path, data in _code():
        _add(cpio, f"{_CODE_ROOT}/{path}", data)


def _add(cpio: CpioWriter, path: str, data: bytes) -> None:
    cpio.file(path, data)
    if path.endswith(".py"):
        add_bytecode(cpio, path, data)


def _init() -> bytes:
    return files("standby.pe.image").joinpath("init.sh").read_bytes()


def _code() -> Iterator[tuple[str, bytes]]:
    for package in CODE_PACKAGES:
        root = Path(str(files(package)))
        for path in sorted(root.rglob("*")):
            name = str(path.relative_to(root.parent))
            if path.is_file() and not any(part in name for part in CODE_LEFT_OUT):
                yield name, path.read_bytes()


def distribution(name: str) -> importlib.metadata.Distribution:
    """The installed distribution; raises ``ImageToolMissing``."""
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError as error:
        raise ImageToolMissing(
            f"The Python distribution {name}, which the PE carries, is not installed here.",
            remedy="Install cdp-standby with all its dependencies into this environment.",
            distribution=name,
        ) from error


def _is_left_out(path: str) -> bool:
    return (
        path.startswith("..")
        or path.endswith(DISTRIBUTION_SUFFIXES_LEFT_OUT)
        or any(part in f"/{path}" for part in DISTRIBUTION_PARTS_LEFT_OUT)
    )
