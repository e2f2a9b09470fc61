"""The pieces of the PE's image that need no network: archives, bytecode, keys, the cache."""

from __future__ import annotations

import importlib.util
import io
import marshal
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from standby.pe import image
from standby.pe.image import code
from standby.pe.image.bytecode import add_bytecode
from standby.pe.image.cache import complete, forget_old
from standby.pe.image.cpio import CpioWriter
from standby.pe.image.recipe import DISTRIBUTIONS, DebianRecipe, debian_key


def test_the_archive_is_what_cpio_expects(tmp_path: Path) -> None:
    out = tmp_path / "a.cpio"
    with out.open("wb") as raw, CpioWriter(raw) as cpio:
        cpio.file("usr/bin/tool", b"#!/bin/sh\n", 0o755)
        cpio.symlink("bin", "usr/bin")
        cpio.file("etc/odd", b"123")
    with out.open("rb") as archive:
        subprocess.run(["cpio", "-id", "--quiet"], stdin=archive, cwd=tmp_path, check=True)
    assert (tmp_path / "bin" / "tool").read_bytes() == b"#!/bin/sh\n"
    assert (tmp_path / "bin" / "tool").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "etc" / "odd").read_bytes() == b"123"


def test_the_same_content_gives_the_same_bytes() -> None:
    def build() -> bytes:
        out = io.BytesIO()
        with CpioWriter(out) as cpio:
            code.write_code(cpio)
        return out.getvalue()

    assert build() == build()


@pytest.mark.parametrize("path", ["/absolute", "a/../b"])
def test_paths_stay_inside(path: str) -> None:
    with pytest.raises(ValueError, match="inside an archive"):
        CpioWriter(io.BytesIO()).file(path, b"")


def test_a_path_twice_is_refused() -> None:
    cpio = CpioWriter(io.BytesIO())
    cpio.file("a", b"")
    with pytest.raises(ValueError, match="twice"):
        cpio.file("a", b"")


def test_bytecode_is_valid_and_bound_to_its_source(tmp_path: Path) -> None:
    out = tmp_path / "a.cpio"
    source = b"ANSWER = 42\n"
    with out.open("wb") as raw, CpioWriter(raw) as cpio:
        cpio.file("m/x.py", source)
        add_bytecode(cpio, "m/x.py", source)
        add_bytecode(cpio, "m/broken.py", b"def (")
    with out.open("rb") as archive:
        subprocess.run(["cpio", "-id", "--quiet"], stdin=archive, cwd=tmp_path, check=True)
    (compiled,) = (tmp_path / "m" / "__pycache__").iterdir()
    data = compiled.read_bytes()
    assert data[:4] == importlib.util.MAGIC_NUMBER
    assert data[8:16] == importlib.util.source_hash(source)
    space: dict[str, object] = {}
    exec(marshal.loads(data[16:]), space)
    assert space["ANSWER"] == 42


def test_the_pe_carries_what_it_needs_and_not_the_hypervisors_side() -> None:
    cpio = CpioWriter(io.BytesIO())
    code.write_code(cpio)
    assert "init" in cpio
    assert "opt/cdp/code/standby/pe/config.py" in cpio
    assert "opt/cdp/code/journal/decoder.py" in cpio
    assert "opt/cdp/code/standby/target/domain.py" not in cpio
    assert "opt/cdp/code/standby/pe/image/build.py" not in cpio


def test_a_change_of_the_recipe_changes_the_key() -> None:
    recipe = DebianRecipe()
    assert debian_key(recipe) == debian_key(DebianRecipe())
    assert debian_key(recipe) != debian_key(replace(recipe, packages=(*recipe.packages, "vim")))


def test_a_distribution_that_is_not_installed_is_named() -> None:
    assert "numpy" in DISTRIBUTIONS
    with pytest.raises(image.ImageToolMissing, match="no-such-distribution"):
        code.distribution("no-such-distribution")


def test_a_file_that_is_not_complete_does_not_appear(tmp_path: Path) -> None:
    target = tmp_path / "layer"
    with pytest.raises(OSError, match="full"), complete(target) as partial:
        partial.write_bytes(b"half")
        raise OSError("the disk is full")
    assert list(tmp_path.iterdir()) == []
    with complete(target) as partial:
        partial.write_bytes(b"whole")
    assert target.read_bytes() == b"whole"


def test_the_cache_forgets_what_was_not_used_lately(tmp_path: Path) -> None:
    for number in range(6):
        path = tmp_path / f"code-{number}"
        path.touch()
        os.utime(path, (1000 + number, 1000 + number))
    forget_old(tmp_path, "code-*", keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["code-4", "code-5"]


def test_the_server_finds_what_was_installed(tmp_path: Path) -> None:
    with pytest.raises(image.PeImageMissing, match="no PE image"):
        image.installed(tmp_path / "pe")
    kernel, initrd = tmp_path / "k", tmp_path / "i"
    kernel.write_bytes(b"kernel")
    initrd.write_bytes(b"initrd")
    for digest in ("a" * 16, "b" * 16):
        built = image.PeImage(kernel, initrd, "6.1.0", digest)
        copy = image.install(built, tmp_path / "pe")
        assert image.installed(tmp_path / "pe") == copy
        assert copy.initrd.read_bytes() == b"initrd"
    # The one before is not kept: what booted it has it in memory.
    assert len(list((tmp_path / "pe").iterdir())) == 3
