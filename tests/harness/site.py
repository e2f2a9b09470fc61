"""A server process with a directory of its own, and the command line of its operator."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.harness.wait import wait_until

SMALL = "[store]\nfile_bytes = 16777216\nmap_bytes = 268435456\n"


class Site:
    def __init__(self, directory: Path, config: str = SMALL) -> None:
        """``config``: further tables of the server's configuration."""
        self.directory = directory
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"https://127.0.0.1:{self.port}"
        self.config = directory / "server.toml"
        self.config.write_text(
            f'directory = "{directory}/state"\nlisten = ["127.0.0.1"]\nport = {self.port}\nurl = "{self.url}"\n'
            + config
        )
        self.env = {**os.environ, "XDG_CONFIG_HOME": str(directory / "config")}
        self.env.pop("CDP_CREDENTIAL", None)
        self.credential = directory / "config/cdp/operator.json"
        self.process: subprocess.Popen[bytes] | None = None

    def initialise(self) -> None:
        """CA, store and the operator's credential."""
        self.cdp("server", "init", "--config", str(self.config), "--output", str(self.credential))

    def start(self) -> None:
        log = (self.directory / "server.log").open("ab")
        words = [sys.executable, "-m", "cdp.cli.main", "server", "run", "--config", str(self.config)]
        self.process = subprocess.Popen(words, stdout=log, stderr=log, env=self.env)
        log.close()
        wait_until(self._answers, 20, "the server's start")

    def stop(self, *, kill: bool = False) -> int:
        assert self.process is not None
        if kill:
            self.process.kill()
        else:
            self.process.terminate()
        return self.process.wait(30)

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.directory / "server.log").read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def cdp(self, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "cdp.cli.main", *words], capture_output=True, text=True, env=self.env, check=False
        )
        assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def json(self, *words: str) -> Any:
        return json.loads(self.cdp(*words, "--json").stdout)


@contextmanager
def running_site(directory: Path) -> Iterator[Site]:
    """With everything in ``directory``; stopped at the end, unless the test has done that."""
    site = Site(directory)
    site.initialise()
    site.start()
    try:
        yield site
    finally:
        if site.process is not None and site.process.poll() is None:
            site.stop()
