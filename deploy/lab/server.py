"""The backup server in its namespace, and the operator's ``cdp`` beside it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from deploy.lab import layout
from deploy.lab.errors import LabFailed
from deploy.lab.layout import Layout, host
from deploy.lab.network import inside
from deploy.lab.programs import Processes, run, wait_until

PROCESS = "server"
START_DEADLINE_S = 30.0


def start(lab: Layout, processes: Processes) -> None:
    """Start ``cdp server`` and wait until it listens."""
    names = ", ".join(f'"{host(address)}"' for address in layout.SERVER_ADDRESSES)
    lab.server_config.write_text(
        f'directory = "{lab.server_dir}"\nurl = "{layout.SERVER_URL}"\n\n[tls]\nnames = [{names}]\n\n'
        # Small and sparse beside a lab's disk.
        "[store]\nfile_bytes = 67108864\n"
    )
    process = processes.start(
        PROCESS, inside(lab.server_namespace, *_cdp(lab), "server", "run", "--config", str(lab.server_config))
    )

    def listens() -> bool:
        processes.check(process)
        return b":1D13 " in Path(f"/proc/{process.pid}/net/tcp").read_bytes() + _tcp6(process.pid)

    wait_until(listens, START_DEADLINE_S, "the server's start", remedy=f"See {lab.logs / 'server.log'}.")


def cdp(lab: Layout, *arguments: str, deadline_s: float = 60.0) -> str:
    """Run the operator's command line at the server."""
    return run(cdp_as_operator(lab, *arguments), deadline_s=deadline_s)


def cdp_json(lab: Layout, *arguments: str, deadline_s: float = 60.0) -> Any:
    """The same with --json, decoded."""
    text = cdp(lab, *arguments, "--json", deadline_s=deadline_s)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise LabFailed(f"cdp {' '.join(arguments)} --json did not answer with JSON: {text[:500]}") from error


def cdp_as_operator(lab: Layout, *arguments: str) -> list[str]:
    return inside(
        lab.server_namespace, "env", f"CDP_CREDENTIAL={lab.server_dir / 'operator.json'}", *_cdp(lab), *arguments
    )


def _cdp(lab: Layout) -> list[str]:
    """``cdp`` out of the wheel that the source got, with the dependencies of the environment that runs the lab: an edit
    of the tree changes nothing in a lab that is up."""
    program = "from cdp.cli.main import main; main()"
    return ["env", f"PYTHONPATH={lab.code}", sys.executable, "-P", "-c", program]


def _tcp6(pid: int) -> bytes:
    return Path(f"/proc/{pid}/net/tcp6").read_bytes()
