"""``cdp ls`` and ``cdp cp`` on what a power cut leaves: file systems whose logs have to be replayed first.

ext4 on a partition of one disk, XFS on the whole of another; both are read while they are mounted, after an fsync. Each
command boots libguestfs's virtual machine, some ten seconds without hardware virtualisation: they are few.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cdp.store import Store
from journal.encoder import Encoder
from journal.extent import Extents, Kind
from journal.wire import DiskInfo
from tests.harness.loop import LoopDisk, scratch_dir
from tests.harness.mounts import MountNamespace
from tests.harness.process import run
from tests.harness.site import Site

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]

PARTITION_AT = 1 << 20
SIZES = {"vda": 96 << 20, "vdb": 320 << 20}
CHUNK = 64 << 10
CONTENT = "".join(f"line {number}\n" for number in range(20_000))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    scratch = scratch_dir("cdp-files-out-")
    # Emulated: what libguestfs starts must not depend on what this host can do.
    site = Site(tmp_path_factory.mktemp("site"))
    site.env["LIBGUESTFS_BACKEND_SETTINGS"] = "force_tcg"
    site.initialise()
    try:
        images = crash_images(scratch)
        with Store.open(site.directory / "state/store", file_bytes=80 << 20, map_bytes=256 << 20) as store:
            put(store, images)
        site.start()
        yield site
    finally:
        if site.process is not None and site.process.poll() is None:
            site.stop()
        shutil.rmtree(scratch)


def crash_images(scratch: Path) -> list[Path]:
    backing = {name: scratch / name for name in SIZES}
    disks: list[LoopDisk] = []
    images: list[Path] = []
    try:
        for name, size_bytes in SIZES.items():
            disks.append(LoopDisk(backing[name], size_bytes))
        subprocess.run(
            ["sfdisk", "-q", "--no-reread", str(backing["vda"])], input=b"label: gpt\nstart=1MiB\n", check=True
        )
        partition = run(["losetup", "--find", "--show", "--offset", str(PARTITION_AT), str(backing["vda"])]).strip()
        try:
            run(["mkfs.ext4", "-q", "-F", partition, str((SIZES["vda"] - 2 * PARTITION_AT) >> 10)])
            run(["mkfs.xfs", "-q", "-f", str(disks[1].device)])
            with MountNamespace(scratch) as namespace:
                for index, device in enumerate((Path(partition), disks[1].device)):
                    mount = scratch / f"mnt{index}"
                    namespace.mount(device, mount)
                    namespace.run(["sh", "-c", write_script(mount)])
                for name in SIZES:
                    image = scratch / f"{name}.crashed"
                    shutil.copyfile(backing[name], image)
                    images.append(image)
        finally:
            run(["losetup", "--detach", partition])
    finally:
        for disk in disks:
            disk.close()
    features = run(["dumpe2fs", "-h", f"{images[0]}?offset={PARTITION_AT}"])
    assert "needs_recovery" in features
    return images


def write_script(mount: Path) -> str:
    """A tree whose newest parts are in the log only."""
    (mount.parent / "content").write_text(CONTENT)
    return (
        f"mkdir -p {mount}/etc/app.d && sync && cp {mount.parent}/content {mount}/etc/app.d/app.conf && "
        f"ln -s app.d/app.conf {mount}/etc/current && chmod 640 {mount}/etc/app.d/app.conf && "
        f"touch '{mount}/etc/app.d/odd name' && sync {mount}/etc/app.d/app.conf {mount}/etc/app.d {mount}/etc"
    )


def put(store: Store, images: list[Path]) -> None:
    """The disks as one second of a machine."""
    infos = [DiskInfo(index=n, name=name, size_bytes=size) for n, (name, size) in enumerate(SIZES.items())]
    machine = store.create_machine("db1", infos)
    rows: list[tuple[int, int, int, int]] = []
    payload: list[bytes] = []
    for disk, image in enumerate(images):
        data = np.fromfile(image, np.uint8).reshape(-1, CHUNK)
        for chunk in np.flatnonzero(data.any(axis=1)).tolist():
            rows.append((disk, chunk * CHUNK, CHUNK, Kind.DATA))
            payload.append(data[chunk].tobytes())
    now_ns = time.time_ns()
    _, raw = Encoder(machine.uuid).encode(
        store.live(machine.uuid),
        Extents.from_rows(rows),
        payload,
        opened_at_ns=now_ns,
        sealed_at_ns=now_ns,
        sealed_monotonic_ns=1,
    )
    store.put_segment(machine.uuid, raw)


def test_files_come_out_of_a_crash_image_with_its_log_replayed(site: Site, tmp_path: Path) -> None:
    listed = {one["name"]: one for one in site.json("ls", "db1", "/etc", "--disk", "vda")}
    assert set(listed) == {"app.d", "current"}
    assert listed["current"]["link"] == "app.d/app.conf"
    # Through the link, and from the log.
    site.cdp("cp", "db1", "/etc/current", str(tmp_path), "--disk", "0")
    assert (tmp_path / "current").read_text() == CONTENT
    assert (tmp_path / "current").stat().st_mode & 0o777 == 0o640
    assert "exists" in site.cdp("cp", "db1", "/etc/current", str(tmp_path), "--disk", "0", code=1).stderr
    told = site.json("cp", "db1", "/etc", str(tmp_path / "tree"), "--disk", "vdb")
    assert told["kind"] == "directory"
    assert (tmp_path / "tree/app.d/app.conf").read_text() == CONTENT
    assert (tmp_path / "tree/app.d/odd name").exists()
    assert str((tmp_path / "tree/current").readlink()) == "app.d/app.conf"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["current", "tree"]
