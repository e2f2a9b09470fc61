"""What ``cdp verify`` and ``cdp compare`` share: start it on the server, and look on until it has ended."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, TypeVar

import msgspec

from cdp.cli.client import Client
from cdp.cli.show import progress
from cdp.server import proof_messages as pm

POLL_S: Final = 0.5

AnswerT = TypeVar("AnswerT", pm.VerifyAnswer, pm.CompareAnswer)


def run(
    client: Client, path: str, request: msgspec.Struct, kind: type[AnswerT], phase: Callable[[AnswerT], str]
) -> AnswerT:
    """The answer after the end. ``phase``: what is being done, for the progress bar."""
    answer = client.send("POST", path, request, kind)
    with progress() as bar:
        task = bar.add_task(phase(answer), total=None)
        while answer.running is not None:
            bar.update(
                task,
                description=phase(answer),
                total=answer.running.total_bytes,
                completed=min(answer.running.done_bytes, answer.running.total_bytes),
            )
            time.sleep(POLL_S)
            answer = client.get(kind, path)
    return answer
