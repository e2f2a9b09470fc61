"""Starts ``cdp server run`` again and again without paying for the imports each time: forks what has imported it all.

One line of standard input is the path of a configuration: the answer is the new server's pid. ``wait`` waits for that
process to end. What is forked runs the command as it is; it can be killed like any other process.
"""

from __future__ import annotations

import os
import sys

import cdp.cli.server
import cdp.server.main  # noqa: F401
from cdp.cli.main import run


def main(log: str) -> None:
    child = 0
    for line in sys.stdin:
        if line.strip() == "wait":
            os.waitpid(child, 0)
            print("ended", flush=True)
            continue
        child = os.fork()
        if child == 0:
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for stream in (1, 2):
                os.dup2(handle, stream)
            os._exit(run(["server", "run", "--config", line.strip()]))
        print(child, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
