"""The documentation names everything that a user meets: error codes, metrics, commands, configuration keys, links."""

from __future__ import annotations

import ast
import re
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

import click
import msgspec
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric

from cdp.agent.metrics import AgentCollector
from cdp.agent.status import Status
from cdp.cli.main import cli
from cdp.server import messages as m
from cdp.server.limit_messages import MachineLimit
from cdp.server.limits import limit_metrics
from cdp.server.metrics import Counters, StatusCollector
from cdp.server.proof_messages import ProofStatus
from cdp.server.retention_messages import RetentionPolicy, RetentionStatus
from journal.wire import Progress

ROOT = Path(__file__).parents[1]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = [path for top in ("journal", "cdp", "standby", "deploy") for path in sorted((ROOT / top).rglob("*.py"))]
OPERATIONS = (ROOT / "docs/operations.md").read_text()


def error_codes() -> Iterator[str]:
    """``code = "..."`` in the body of any class."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            for line in node.body if isinstance(node, ast.ClassDef) else []:
                match line:
                    case (
                        ast.Assign(targets=[ast.Name(id="code")], value=ast.Constant(value=str(code)))
                        | ast.AnnAssign(target=ast.Name(id="code"), value=ast.Constant(value=str(code)))
                    ):
                        yield code
                    case _:
                        pass


def test_every_error_code_is_documented_and_no_other() -> None:
    codes = set(error_codes())
    assert len(codes) > 100
    rows = re.findall(
        r"^\| (`[a-z-]+`(?:, `[a-z-]+`)*)(?: \*t\*)? \|", OPERATIONS.split("## Errors and remedies")[1], re.M
    )
    told = {code for row in rows for code in re.findall(r"`([a-z-]+)`", row)} | {"lab-failed", "lab-not-ready"}
    assert codes - told == set()
    assert told - codes == set()


def exported(*collectors: Iterable[Metric]) -> set[str]:
    return {
        metric.name + ("_total" if metric.type == "counter" else "")
        for collector in collectors
        for metric in collector
        if not metric.name.endswith("_created")
    }


def agent_metrics() -> set[str]:
    status = Status(boot_id="boot", sealed_at_s=1.0, stored_at_s=1.0, captured_at_s=1.0)
    status.progress = Progress(what="seed", done_bytes=1, total_bytes=2, eta_s=1.0)
    status.lost["ring-full"] = 1
    status.resyncs["seed"] = 1
    return exported(AgentCollector(status, "db1").collect())


def server_metrics() -> set[str]:
    progress = Progress(what="seed", done_bytes=1, total_bytes=2, eta_s=1.0)
    peer = {"connected": True, "last_heard_s": 1.0, "state": "ready", "progress": progress}
    stages: tuple[m.Stage, ...] = ("captured", "sealed", "stored", "applied")
    status = m.MachineStatus(
        machine=str(uuid.UUID(int=1)),
        name="db1",
        protected=True,
        side="source",
        generation=1,
        disks=[],
        stages=[m.StageStatus(stage=stage, position=None, at_s=1.0, lag_s=1.0, backlog_bytes=1) for stage in stages],
        fuzzy=False,
        fuzzy_reason="",
        recovery_point=None,
        recovery_point_at_s=1.0,
        journal=m.JournalStatus(segment_bytes=1, file_bytes=1, oldest_s=1.0, newest_s=1.0),
        proof=ProofStatus(verified_s=1.0, verify_success=True, compared_s=1.0, compare_success=True),
        retention=RetentionStatus(policy=RetentionPolicy(), is_default=True, will_hold_s=1.0),
        agent=msgspec.convert(peer | {"resyncs": {"seed": 1}}, m.AgentStatus, from_attributes=True),
        standby=msgspec.convert(peer, m.StandbyStatus, from_attributes=True),
        standby_state="ready",
        replica=None,
        spec=None,
        takeover={"id": "1"},
        problems=[],
    )
    counters = Counters()
    counters.stored(uuid.UUID(int=1), 1, 0.1, duplicate=False)
    registry = CollectorRegistry()
    registry.register(StatusCollector(lambda: [status], lambda _: {"check": 1.0}))
    limits = limit_metrics([MachineLimit(name="db1", allowed_bytes_per_s=1)])
    return exported(registry.collect(), counters.registry.collect(), limits)


def test_every_metric_is_documented_and_no_other() -> None:
    server, agent = (
        OPERATIONS.split("### Metrics of the server")[1].split("## Sizing")[0].split("### Metrics of the agent")
    )
    for text, names in ((server, server_metrics()), (agent, agent_metrics())):
        assert set(re.findall(r"^\| `(cdp_\w+)` \|", text, re.M)) == names


def commands(group: click.Group, prefix: str) -> Iterator[str]:
    """Those that do something of their own, from ``cdp`` down."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield f"{prefix} {name}"
        if isinstance(command, click.Group):
            yield from commands(command, f"{prefix} {name}")


def test_every_command_is_documented() -> None:
    text = (ROOT / "README.md").read_text() + OPERATIONS
    assert [name for name in commands(cli, "cdp") if not re.search(rf"\b{name}\b", text)] == []


@pytest.mark.parametrize("path", [*DOCS, *SOURCES], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_command_is_named_that_does_not_exist(path: Path) -> None:
    """In the documents between backticks, in remedies between quotes."""
    known = set(commands(cli, "cdp"))
    groups = {name for name in known if any(other.startswith(name + " ") for other in known)}
    quote = "`" if path.suffix == ".md" else "'"
    for found in re.findall(rf"{quote}(cdp [a-z]+(?: [a-z]+)?)", path.read_text()):
        first, second = " ".join(found.split()[:2]), found
        assert first in known, f"{path.name}: {found}"
        assert first not in groups or second in known, f"{path.name}: {found}"


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
