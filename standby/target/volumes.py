"""The standby's files, through libvirt's storage API, so that a remote hypervisor is no special case.

storage_dir/
    NAME-disk0.raw ..      target disks: sparse, of the protected disks' sizes, kept until ``remove``
    NAME-config.raw        the PE's configuration
    pe-DIGEST-kernel, -initrd, -whole      shared by all standbys; ``whole`` is empty and says they are
"""

from __future__ import annotations

import contextlib
import io
import re
import uuid
from pathlib import Path
from typing import BinaryIO
from xml.etree import ElementTree as ET

import libvirt

from standby.pe.image import PeImage
from standby.spec import MachineSpec, StandbySpec
from standby.target.boot import PeBoot
from standby.target.errors import TargetDiskMismatch, TargetStorageFull
from standby.target.xml import Files

_IMAGE_NAME = re.compile(r"pe-([0-9a-f]{16})-")
_RESERVE_BYTES = 256 << 20
"""Room beside the disks: PE images, the console log."""


class Volumes:
    """The pool that ``standby.storage_dir`` is. Methods raise ``libvirtError`` beside what they name."""

    def __init__(self, connection: libvirt.virConnect, spec: MachineSpec, standby: StandbySpec) -> None:
        self._connection = connection
        self._spec = spec
        self._standby = standby
        self._pool = self._open_pool()

    def files(self) -> Files:
        """Where everything lies, whether it exists yet or not."""
        return Files(
            disks=tuple(self._path(self._disk_name(disk.index)) for disk in self._spec.disks),
            config=self._path(self._config_name),
            console_log=self._path(f"{self._spec.name}-console.log"),
        )

    def create_disks(self) -> None:
        """Create the target disks that do not exist. Raises ``TargetStorageFull`` and ``TargetDiskMismatch``."""
        missing = []
        for disk in self._spec.disks:
            held = self._find(self._disk_name(disk.index))
            if held is None:
                missing.append(disk)
            elif (capacity := held.info()[1]) != disk.size_bytes:
                raise TargetDiskMismatch(
                    f"The target disk {held.path()} has {capacity} bytes, the protected disk {disk.name} has "
                    f"{disk.size_bytes}.",
                    remedy=f"Remove the standby and its disks: 'cdp standby remove {self._spec.name}', then define it.",
                    path=held.path(),
                    target_bytes=capacity,
                    source_bytes=disk.size_bytes,
                )
        needed = sum(disk.size_bytes for disk in missing)
        available = self._pool.info()[3]
        if missing and needed + _RESERVE_BYTES > available:
            raise TargetStorageFull(
                f"{self._standby.storage_dir} has {available >> 20} MiB left; full copies of the disks of "
                f"{self._spec.name!r} may need {(needed + _RESERVE_BYTES) >> 20} MiB.",
                remedy="Free room there or name another storage directory.",
                available_bytes=available,
                needed_bytes=needed,
            )
        for disk in missing:
            self._create(self._disk_name(disk.index), disk.size_bytes, sparse=True)

    def write_config(self, content: bytes) -> None:
        volume = self._find(self._config_name) or self._create(self._config_name, len(content), sparse=False)
        self._send(volume, io.BytesIO(content), len(content))

    def upload_image(self, image: PeImage) -> PeBoot:
        """Bring kernel and initramfs to the hypervisor, unless they are there; drop those that no domain boots."""
        kernel, initrd, whole = (f"pe-{image.digest}-{part}" for part in ("kernel", "initrd", "whole"))
        if self._find(whole) is None:
            for name, path in ((kernel, image.kernel), (initrd, image.initrd)):
                self._upload_file(name, path)
            # Only now: an upload that was cut short is done again.
            self._create(whole, 0, sparse=False)
        self._drop_unused_images(image.digest)
        return PeBoot(kernel=self._path(kernel), initrd=self._path(initrd), arguments=image.arguments)

    def delete(self) -> None:
        """Delete this machine's files; the PE images stay for others."""
        for name in (*(self._disk_name(disk.index) for disk in self._spec.disks), self._config_name):
            volume = self._find(name)
            if volume is not None:
                volume.delete()

    @property
    def _config_name(self) -> str:
        return f"{self._spec.name}-config.raw"

    def _disk_name(self, index: int) -> str:
        return f"{self._spec.name}-disk{index}.raw"

    def _path(self, name: str) -> str:
        return str(Path(self._standby.storage_dir) / name)

    def _open_pool(self) -> libvirt.virStoragePool:
        """The pool over the directory: one that exists already, whoever made it, or a transient one of ours."""
        target = self._standby.storage_dir
        for pool in self._connection.listAllStoragePools():
            path = ET.fromstring(pool.XMLDesc()).findtext("target/path")  # noqa: S314  libvirt's own description
            if path is not None and Path(path) == Path(target):
                if not pool.isActive():
                    pool.create()
                pool.refresh()
                return pool
        name = f"cdp-{uuid.uuid5(uuid.NAMESPACE_URL, 'file://' + target).hex[:12]}"
        pool_xml = ET.Element("pool", type="dir")
        ET.SubElement(pool_xml, "name").text = name
        ET.SubElement(ET.SubElement(pool_xml, "target"), "path").text = target
        return self._connection.storagePoolCreateXML(
            ET.tostring(pool_xml, encoding="unicode"), libvirt.VIR_STORAGE_POOL_CREATE_WITH_BUILD
        )

    def _find(self, name: str) -> libvirt.virStorageVol | None:
        return next((volume for volume in self._pool.listAllVolumes() if volume.name() == name), None)

    def _create(self, name: str, capacity_bytes: int, *, sparse: bool) -> libvirt.virStorageVol:
        volume = ET.Element("volume")
        ET.SubElement(volume, "name").text = name
        ET.SubElement(volume, "capacity", unit="bytes").text = str(capacity_bytes)
        ET.SubElement(volume, "allocation", unit="bytes").text = "0" if sparse else str(capacity_bytes)
        target = ET.SubElement(volume, "target")
        ET.SubElement(target, "format", type="raw")
        ET.SubElement(ET.SubElement(target, "permissions"), "mode").text = "0600"
        return self._pool.createXML(ET.tostring(volume, encoding="unicode"))

    def _drop_unused_images(self, current: str) -> None:
        definitions = [domain.XMLDesc() for domain in self._connection.listAllDomains()]
        for volume in self._pool.listAllVolumes():
            digest = _IMAGE_NAME.match(volume.name())
            if digest and digest[1] != current and not any(f"pe-{digest[1]}-" in text for text in definitions):
                volume.delete()

    def _upload_file(self, name: str, path: Path) -> None:
        held = self._find(name)
        if held is not None:
            held.delete()
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            self._send(self._create(name, size_bytes, sparse=False), file, size_bytes)

    def _send(self, volume: libvirt.virStorageVol, content: BinaryIO, size_bytes: int) -> None:
        stream = self._connection.newStream()
        try:
            volume.upload(stream, 0, size_bytes)
            stream.sendAll(lambda _stream, limit_bytes, _opaque: content.read(limit_bytes), None)
        except BaseException:
            # The first error counts; a stream that libvirt ended already cannot be aborted again.
            with contextlib.suppress(libvirt.libvirtError):
                stream.abort()
            raise
        stream.finish()
