"""The replicated kernel's modules: which of them its first minute on virtio needs, in the order to load them."""

from __future__ import annotations

import gzip
import lzma
import re
from pathlib import Path
from typing import Final

import zstandard

from standby.pe.errors import SystemNotFound

VIRTIO: Final = ("virtio_pci", "virtio_blk", "virtio_scsi", "sd_mod", "virtio_net")
CHECKSUMS: Final = ("crc32c_generic", "libcrc32c")
"""ext4 and XFS ask the kernel's crypto for crc32c by name, which modules.dep does not show."""
_MODULE_BYTES_MAX: Final = 64 << 20
_SUFFIX: Final = re.compile(r"\.ko(\.(xz|zst|gz))?$")


class ModuleTree:
    """``/lib/modules/RELEASE`` of the replicated system."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            lines = (directory / "modules.dep").read_text().splitlines()
            self._builtin = {_name(line) for line in (directory / "modules.builtin").read_text().splitlines()}
        except OSError as error:
            raise SystemNotFound(
                f"The replicated kernel's module index cannot be read: {error}.",
                remedy="Check that the kernel package of the source is completely installed.",
            ) from error
        pairs = (line.partition(":") for line in lines)
        self._needs = {_name(path): (path, rest.split()) for path, _, rest in pairs}

    def has(self, name: str) -> bool:
        name = name.replace("-", "_")
        return name in self._needs or name in self._builtin

    def in_order(self, names: tuple[str, ...], *, optional: tuple[str, ...] = ()) -> list[str]:
        """Paths, relative to the directory, of ``names`` and all that they need, each after what it needs.

        What is built in needs no file. Raises ``SystemNotFound`` if one of ``names`` is neither.
        """
        ordered: list[str] = []
        for name in (*optional, *names):
            key = name.replace("-", "_")
            if key in self._needs:
                path, needs = self._needs[key]
                # modules.dep lists what to load first at the end.
                ordered += [each for each in (*reversed(needs), path) if each not in ordered]
            elif key not in self._builtin and name not in optional:
                raise SystemNotFound(
                    f"The replicated kernel has no driver {name}.",
                    remedy="Install the source distribution's full kernel package (not a cut-down cloud flavour).",
                    module=name,
                )
        return ordered

    def read(self, path: str) -> bytes:
        """A module, unpacked: the tools of a mini initrd know no compression."""
        raw = (self.directory / path).read_bytes()
        if path.endswith(".xz"):
            return lzma.decompress(raw)
        if path.endswith(".zst"):
            unpacked: bytes = zstandard.ZstdDecompressor().decompress(raw, max_output_size=_MODULE_BYTES_MAX)
            return unpacked
        return gzip.decompress(raw) if path.endswith(".gz") else raw


def _name(path: str) -> str:
    return _SUFFIX.sub("", path.rsplit("/", 1)[-1]).replace("-", "_")
