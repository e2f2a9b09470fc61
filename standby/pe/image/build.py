"""Build the PE: a kernel and an initramfs of three layers, each cached by what it is made of.

    layer          made from                         changes with            takes
    debian-KEY     Debian packages, extracted        recipe.DebianRecipe     about 20 s, network
    packages-KEY   installed Python distributions    their versions          seconds
    code-KEY       init.sh, journal, standby         every edit              a blink

The kernel unpacks concatenated archives one after the other, so a change of code only writes the last one anew. Every
file appears under its final name only when it is complete, so a build that was killed leaves nothing half made; one
lock keeps two builds of one cache apart.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from standby.pe.image import code
from standby.pe.image.cache import complete, default_cache_dir, forget_old, locked, used
from standby.pe.image.cpio import CpioWriter
from standby.pe.image.debian import DebianLayer, fetch_packages
from standby.pe.image.errors import PeImageMissing
from standby.pe.image.program import run
from standby.pe.image.recipe import DEFAULT_MIRROR, KERNEL_ARGUMENTS, DebianRecipe, debian_key

Progress = Callable[[str], None]
"""Told what is being done, one short sentence at a time."""

_COMPRESS_DEADLINE_S = 600.0
_DESCRIPTION = "image.json"


@dataclass(frozen=True)
class PeImage:
    """A bootable PE. ``digest`` names its content; ``release`` is its kernel's; ``arguments`` are what it needs."""

    kernel: Path
    initrd: Path
    release: str
    digest: str
    arguments: str = KERNEL_ARGUMENTS


def build(
    cache_dir: Path | None = None,
    *,
    mirror: str | None = None,
    refresh: bool = False,
    recipe: DebianRecipe | None = None,
    progress: Progress = lambda _: None,
) -> PeImage:
    """Return the PE image for this code, building what the cache does not have.

    ``refresh`` builds the distribution layer again, to pick up security updates. ``mirror`` defaults to
    $CDP_DEBIAN_MIRROR or Debian's own. Raises ``ImageBuildFailed`` and ``ImageToolMissing``.
    """
    code.check_interpreter()
    recipe = recipe or DebianRecipe()
    mirror = mirror or os.environ.get("CDP_DEBIAN_MIRROR") or DEFAULT_MIRROR
    directory = (cache_dir or default_cache_dir()) / "pe"
    directory.mkdir(parents=True, exist_ok=True)
    with locked(directory):
        base, kernel, release = _debian_layer(directory, recipe, mirror, refresh, progress)
        packages = directory / f"packages-{code.distributions_key()}.cpio.lz4"
        if not packages.exists():
            progress("packing the Python distributions")
            _compressed(packages, code.write_distributions)
        own = directory / f"code-{code.code_key()}.cpio.lz4"
        if not own.exists():
            progress("packing our own code")
            _compressed(own, code.write_code)
        layers = (base, packages, own)
        digest = hashlib.sha256(" ".join(path.name for path in (kernel, *layers)).encode()).hexdigest()[:16]
        initrd = directory / f"initrd-{digest}.img"
        if refresh or not initrd.exists():
            progress("joining the layers")
            with complete(initrd) as partial:
                _join(layers, partial)
        for path in (*layers, kernel, initrd, directory / f"release-{debian_key(recipe)}"):
            used(path)
        for pattern in ("code-*", "initrd-*", "packages-*", "debian-*", "vmlinuz-*", "release-*"):
            forget_old(directory, pattern, keep=4)
    return PeImage(kernel, initrd, release, digest)


def _debian_layer(
    directory: Path, recipe: DebianRecipe, mirror: str, refresh: bool, progress: Progress
) -> tuple[Path, Path, str]:
    key = debian_key(recipe)
    layer = directory / f"debian-{key}.cpio.lz4"
    kernel = directory / f"vmlinuz-{key}"
    release = directory / f"release-{key}"
    if refresh or not (layer.exists() and kernel.exists() and release.exists()):
        with tempfile.TemporaryDirectory(prefix="building-", dir=directory) as scratch:
            packages = Path(scratch) / "packages.tar"
            progress(f"fetching the packages of Debian {recipe.suite}")
            fetch_packages(recipe, mirror, packages)
            progress("thinning the distribution layer out")
            raw, new_kernel = Path(scratch) / "layer.cpio", Path(scratch) / "vmlinuz"
            name = DebianLayer(recipe, packages).write(raw, new_kernel)
            progress("compressing the distribution layer")
            with complete(layer) as partial:
                _compress(raw, partial)
            new_kernel.rename(kernel)
            with complete(release) as partial:
                partial.write_text(name)
    return layer, kernel, release.read_text()


def _compressed(out: Path, write: Callable[[CpioWriter], None]) -> None:
    with tempfile.TemporaryDirectory(prefix="building-", dir=out.parent) as scratch:
        raw = Path(scratch) / "layer.cpio"
        with raw.open("wb") as file, CpioWriter(file) as cpio:
            write(cpio)
        with complete(out) as partial:
            _compress(raw, partial)


def _compress(raw: Path, out: Path) -> None:
    # The legacy format (-l) is the one that the kernel unpacks; it may be concatenated, but not padded.
    run(["lz4", "-l", "-9", "-q", "-f", str(raw), str(out)], deadline_s=_COMPRESS_DEADLINE_S)


def _join(layers: tuple[Path, ...], out: Path) -> None:
    with out.open("wb") as whole:
        for layer in layers:
            with layer.open("rb") as part:
                shutil.copyfileobj(part, whole)


def install(image: PeImage, directory: Path) -> PeImage:
    """Copy ``image`` to where the server looks for it; returns the copy."""
    directory.mkdir(parents=True, exist_ok=True)
    copy = PeImage(
        directory / f"kernel-{image.digest}",
        directory / f"initrd-{image.digest}",
        image.release,
        image.digest,
        image.arguments,
    )
    for source, target in ((image.kernel, copy.kernel), (image.initrd, copy.initrd)):
        if not target.exists():
            with complete(target) as partial:
                shutil.copyfile(source, partial)
    # The description is written last: it makes the new image the installed one.
    with complete(directory / _DESCRIPTION) as partial:
        partial.write_text(json.dumps({"digest": image.digest, "release": image.release, "arguments": image.arguments}))
    for path in (*directory.glob("kernel-*"), *directory.glob("initrd-*")):
        if not path.name.endswith(image.digest):
            path.unlink()
    return copy


def installed(directory: Path) -> PeImage:
    """The image in ``directory``; raises ``PeImageMissing``."""
    try:
        held = json.loads((directory / _DESCRIPTION).read_text())
    except FileNotFoundError as error:
        raise PeImageMissing(
            f"There is no PE image in {directory}.",
            remedy="Run 'cdp pe build' on the server.",
            directory=str(directory),
        ) from error
    digest = held["digest"]
    return PeImage(
        directory / f"kernel-{digest}", directory / f"initrd-{digest}", held["release"], digest, held["arguments"]
    )
