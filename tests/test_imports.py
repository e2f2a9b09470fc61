"""The direction of imports is part of the architecture: see the last section of docs/architecture.md."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("journal", "cdp", "standby", "deploy", "tests")

ALLOWED: dict[str, tuple[str, ...]] = {
    "journal": ("journal",),
    "cdp.agent": ("journal", "cdp.agent", "standby.takeover.address"),
    "cdp.store": ("journal", "cdp.store", "cdp.imagefile"),
    "cdp.server": ("journal", "cdp.store", "cdp.server", "standby"),
    "cdp.cli": ("journal", "cdp", "standby"),
    "standby.replay": ("journal", "standby.replay"),
    "standby.pe": ("journal", "standby.replay", "standby.pe", "standby.takeover.address"),
    "standby.target": ("journal", "standby.spec", "standby.target", "standby.pe.config", "standby.pe.image"),
    "standby.takeover": ("journal", "standby.spec", "standby.takeover"),
    "standby": ("journal", "standby.spec"),
}
"""Package -> the prefixes it may import. The longest package that contains a module is the one that counts."""


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_the_right_way(package: str) -> None:
    wrong = []
    for path in sorted((ROOT / package.replace(".", "/")).rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        owner = max((name for name in ALLOWED if within(module, name)), key=len)
        if owner != package:
            continue
        wrong += [
            f"{path.relative_to(ROOT)}:{line} imports {name}"
            for line, name in imports_of(path)
            if name.split(".")[0] in OURS and not any(within(name, prefix) for prefix in ALLOWED[package])
        ]
    assert not wrong, "\n".join(wrong)
