"""A small sysfs on a real file system: the kernel's layout, with values of our choosing."""

from __future__ import annotations

from pathlib import Path


class FakeSysfs:
    """Directories below ``root``; ``dev/block/M:m`` are links into ``devices``, as the kernel has them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "dev/block").mkdir(parents=True)

    def disk(self, name: str, number: str, **files: str) -> Path:
        return self._device(self.root / "devices/block" / name, number, {"size": "131072", "ro": "0"} | files)

    def partition(self, disk: Path, name: str, number: str, start: int) -> Path:
        return self._device(disk / name, number, {"size": "2048", "ro": "0", "partition": "1", "start": str(start)})

    def stack(self, below: Path, above: Path) -> None:
        """``above`` is built on ``below``."""
        for place, target in ((below / "holders", above), (above / "slaves", below)):
            place.mkdir(exist_ok=True)
            (place / target.name).symlink_to(target)

    def _device(self, directory: Path, number: str, files: dict[str, str]) -> Path:
        for name, value in ({"dev": number} | files).items():
            path = directory / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(value + "\n")
        (self.root / "dev/block" / number).symlink_to(directory)
        return directory
