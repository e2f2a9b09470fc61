"""The ``cdp`` command against ``cdp server run`` as a process, with a machine whose disk has a known history."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from cdp.server import messages as m
from journal import wire
from journal.segment import Flags
from tests.cli.source import BLOCK, DISK_BYTES, Source
from tests.harness.site import Site, running_site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with running_site(tmp_path_factory.mktemp("site")) as site:
        yield site


@pytest.fixture(scope="module")
def source(site: Site) -> Source:
    source = Source(site, "db1")
    refused = site.cdp("protect", "db1", code=1)
    assert "has not reported its disks" in refused.stderr
    source.protect("--disk", "/dev/vda", "--service-address", "192.0.2.5/24", "--probe", "tcp:5432")
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"seed {seed}")
    rng = random.Random(seed)
    start = time.time() - 100
    for second in range(40):
        writes = {
            block * BLOCK: rng.randbytes(BLOCK) for block in rng.sample(range(DISK_BYTES // BLOCK), rng.randint(0, 60))
        }
        fuzzy = 20 <= second < 24
        source.write(start + second, writes, Flags.FUZZY if fuzzy else Flags.NONE)
    return source


def test_any_second_is_recovered_as_it_was(site: Site, source: Source, tmp_path: Path) -> None:
    for number, (at_s, image) in enumerate(random.Random(1).sample(source.history, 5)):
        out = tmp_path / f"{number}.raw"
        told = site.json("recover", "db1", "--at", f"@{at_s + 0.5}", "-o", str(out))
        assert out.read_bytes() == image, f"second {number} at {at_s}"
        assert (told["format"], told["size_bytes"], told["output"]) == ("raw", DISK_BYTES, str(out))
        assert told["sealed_at_s"] == pytest.approx(at_s)
    latest = tmp_path / "latest.qcow2"
    site.cdp("recover", "db1", "-o", str(latest))
    assert subprocess.run(["qemu-img", "check", str(latest)], check=True, capture_output=True)
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(latest), str(tmp_path / "back.raw")], check=True)
    assert (tmp_path / "back.raw").read_bytes() == source.history[-1][1]
    assert {path.name for path in tmp_path.iterdir()} == {*(f"{n}.raw" for n in range(5)), "latest.qcow2", "back.raw"}


def test_a_recovered_file_is_sparse(site: Site, source: Source, tmp_path: Path) -> None:
    at_s, image = source.history[0]
    out = tmp_path / "first.raw"
    site.cdp("recover", "db1", "--at", f"@{at_s}", "-o", str(out))
    assert out.stat().st_size == DISK_BYTES
    assert out.stat().st_blocks * 512 <= DISK_BYTES - image.count(bytes(BLOCK)) * BLOCK + (1 << 20)


def test_what_cannot_be_recovered_is_told(site: Site, source: Source, tmp_path: Path) -> None:
    out = str(tmp_path / "x.raw")
    fuzzy_s = source.history[0][0] + 22
    assert "fuzzy" in site.cdp("recover", "db1", "--at", f"@{fuzzy_s}", "-o", out, code=1).stderr
    assert "so early" in site.cdp("recover", "db1", "--at", "@1000", "-o", out, code=1).stderr
    assert "no disk" in site.cdp("recover", "db1", "--disk", "9", "-o", out, code=1).stderr
    assert "no machine" in site.cdp("recover", "nobody", "-o", out, code=1).stderr
    site.cdp("recover", "db1", "--at", "yesterday-ish", "-o", out, code=2)
    Path(out).write_text("precious")
    assert "exists" in site.cdp("recover", "db1", "-o", out, code=1).stderr
    assert Path(out).read_text() == "precious"
    assert "cannot be written" in site.cdp("recover", "db1", "-o", str(tmp_path / "none" / "x.raw"), code=1).stderr


def test_points_and_status_agree(site: Site, source: Source) -> None:
    found = site.json("points", "db1", "--from", "-1h")
    assert [point[0] for point in found["points"]] == pytest.approx([at_s for at_s, _ in source.history])
    assert len(found["fuzzy"]) == 1
    assert all(point[2] > 0 for point in found["points"])
    status = msgspec.convert(site.json("status", "db1"), m.MachineStatus)
    assert status.recovery_point == found["points"][-1][1]
    assert (status.protected, status.side, status.fuzzy) == (True, "source", False)
    assert "recovery points" in site.cdp("points", "db1").stdout
    assert "db1" in site.cdp("status").stdout
    assert "The agent is not connected." in site.cdp("status", "db1").stdout
    assert [one["name"] for one in site.json("machines")] == ["db1"]


def test_operators_join_each_other(site: Site, tmp_path: Path) -> None:
    words = site.cdp("operators", "token").stdout.split()
    env = {**site.env, "XDG_CONFIG_HOME": str(tmp_path)}

    def as_new(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "cdp.cli.main", *arguments], capture_output=True, text=True, env=env, check=False
        )

    if not Path("/var/lib/cdp-server/operator.json").exists():
        assert as_new("machines").returncode == 4
    wrong = words[-1].replace("cdp1.", "cdp1.0", 1)[:-1]
    assert "another one" in as_new("login", words[2], wrong).stderr
    assert as_new(*words[1:], "--name", "ann").returncode == 0
    credential = tmp_path / "cdp" / "operator.json"
    assert credential.stat().st_mode & 0o777 == 0o600
    assert as_new("machines").returncode == 0
    again = as_new(*words[1:])
    assert (again.returncode, "used already" in again.stderr) == (1, True)
    assert any(line["actor"] == "ann" and line["action"] == "join" for line in site.json("audit"))


def test_usage_errors_and_refusals_have_their_codes(site: Site, source: Source) -> None:
    site.cdp("machines", "add", "Not A Name", code=1)
    site.cdp("machines", "add", "db1", code=1)
    site.cdp("protect", "db1", "--service-address", "10.0.0.5", code=2)
    site.cdp("protect", "db1", "--probe", "smtp:25", code=2)
    site.cdp("protect", "db1", "--hypervisor", "qemu:///system", code=1)
    assert "vda" in site.cdp("protect", "db1", "--disk", "sdz", code=1).stderr
    site.cdp("nonsense", code=2)
    assert "no standby" in site.cdp("standby", "start", "db1", code=1).stderr
    assert "never been taken over" in site.cdp("rollback", "db1", code=1).stderr
    assert "is protected" in site.cdp("machines", "remove", "db1", code=1).stderr
    refused = site.cdp("takeover", "db1", code=5)
    assert "no standby" in refused.stderr
    assert site.json("takeovers", "db1")[0]["state"] == "failed"


def test_the_server_can_be_killed_and_comes_back(site: Site, source: Source) -> None:
    before = site.json("status", "db1")["stages"]
    site.stop(kill=True)
    assert "cannot be reached" in site.cdp("machines", code=3).stderr
    site.start()
    assert [stage["position"] for stage in site.json("status", "db1")["stages"]] == [
        stage["position"] for stage in before
    ]
    locked = site.cdp("server", "init", "--config", str(site.config), code=1)
    assert "Another process" in locked.stderr
    assert site.stop() == 0
    site.start()


def test_a_removed_machine_is_gone(site: Site) -> None:
    source = Source(site, "web1")
    site.cdp("machines", "remove", "web1")
    assert "no machine" in site.cdp("status", "web1", code=1).stderr
    with pytest.raises(Exception, match="not known to this server"):
        source.client.raw("GET", wire.MACHINE.format(machine=source.machine))
    source.client.close()
