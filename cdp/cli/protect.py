"""``cdp protect`` and ``cdp standby``."""

from __future__ import annotations

import ipaddress
import re
from typing import Any, get_args

import click

from cdp.cli.client import connect, name_in
from cdp.cli.show import json_option, print_json
from cdp.cli.status import print_machine
from cdp.server import messages as m
from journal.errors import BadRequest
from standby.spec import Deadlines, Probe, QuiesceMode, SourceDomain, StandbySpec

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


class Size(click.ParamType[int]):
    """``2G``, ``512M`` or plain bytes."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"(\d{1,15})([kmgt]?)(i?b)?", str(value).lower())
        if match is None:
            self.fail(f"{value!r} is not a size such as 1G or 768M.", param, ctx)
        return int(match[1]) * _UNITS[match[2]]


class ProbeType(click.ParamType[Probe]):
    name = "KIND:PORT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Probe:
        try:
            return Probe.parse(str(value))
        except ValueError as error:
            self.fail(f"{error}.", param, ctx)


class AddressType(click.ParamType[str]):
    name = "ADDRESS/PREFIX"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            if "/" not in str(value):
                raise ValueError("the prefix length is missing")
            return str(ipaddress.ip_interface(str(value)))
        except ValueError as error:
            self.fail(f"{value!r} is not an address with its prefix, as in 10.0.0.5/24: {error}.", param, ctx)


class DeadlineType(click.ParamType[tuple[str, float]]):
    name = "PHASE=SECONDS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        phase, _, seconds = str(value).partition("=")
        phase = phase.replace("-", "_")
        if phase not in Deadlines.__struct_fields__:
            self.fail(f"The phases are {', '.join(Deadlines.__struct_fields__)}.", param, ctx)
        try:
            return phase, float(seconds)
        except ValueError:
            self.fail(f"{seconds!r} is not a number of seconds.", param, ctx)


@click.command()
@click.argument("name")
@click.option("--disk", "disks", multiple=True, help="A disk that the agent must report; all of them, or none.")
@click.option("--service-address", "service_addresses", multiple=True, type=AddressType(), help="Moves at a takeover.")
@click.option(
    "--probe",
    "probes",
    multiple=True,
    type=ProbeType(),
    help="How to tell that the service answers: tcp:PORT, postgresql:PORT, http:PORT/PATH, https:PORT/PATH.",
)
@click.option(
    "--quiesce",
    type=click.Choice(get_args(QuiesceMode)),
    default="freeze",
    show_default=True,
    help="How a planned takeover stops the writers.",
)
@click.option("--hypervisor", help="libvirt URI of the standby's hypervisor. Without one the machine is only recorded.")
@click.option("--bridge", help="The hypervisor's network bridge.")
@click.option("--standby-address", type=AddressType(), help="The standby's own address, beside the service addresses.")
@click.option("--standby-gateway", help="Its default gateway.")
@click.option("--memory", type=Size(), default="1G", show_default=True, help="Memory of the standby.")
@click.option("--vcpus", type=click.IntRange(1, 512), default=2, show_default=True)
@click.option("--storage-dir", default="/var/lib/libvirt/images", show_default=True, help="On the hypervisor.")
@click.option("--source-hypervisor", help="The source is itself a domain here, to be powered off if it is gone.")
@click.option("--source-domain", help="Its name there.")
@click.option("--deadline", "deadlines", multiple=True, type=DeadlineType(), help="How long a phase may take.")
@click.option("--silence", type=float, help="Seconds after which a silent source counts as gone.")
@click.option("--rollback-window", type=float, help="Seconds that a fenced source is kept ready.")
@click.option("--automatic-rollback/--no-automatic-rollback", default=None)
@click.option("--start-standby/--no-start-standby", default=True, show_default=True)
@json_option
def protect(name: str, as_json: bool, **given: Any) -> None:
    """Start the protection of NAME, or change what is to happen in a takeover.

    The agent must have joined and run: its disks are taken from its report. The seed begins at once; with a
    hypervisor the standby is defined and started, too.

    \b
    Examples:
      cdp protect db1
      cdp protect db1 --service-address 10.0.0.5/24 --service-address fd00::5/64 --probe postgresql:5432 \\
        --quiesce postgresql --hypervisor qemu+ssh://kvm1/system --bridge br0 \\
        --standby-address 10.0.0.6/24 --standby-gateway 10.0.0.1 --memory 4G
    """
    try:
        request = _request(given)
    except ValueError as error:
        raise BadRequest(f"{error}.", remedy="See 'cdp protect --help'.") from None
    status = connect().send("PUT", name_in(m.PROTECTION, name), request, m.MachineStatus)
    if as_json:
        print_json(status)
    else:
        print_machine(status)


@click.group()
def standby() -> None:
    """Define, start, stop or remove the standby of a machine.

    \b
    Examples:
      cdp standby stop db1         # replication resumes where it was at the next start
      cdp standby define db1       # with a newly built PE
      cdp standby start db1
      cdp standby remove db1       # with its disks
    """


def _add_act(act: Any, help_: str) -> None:
    @standby.command(act, help=help_)
    @click.argument("name")
    @json_option
    def command(name: str, as_json: bool) -> None:
        status = connect().send("POST", name_in(m.STANDBY, name), m.StandbyAct(act=act), m.MachineStatus)
        if as_json:
            print_json(status)
        else:
            print_machine(status)


_add_act("define", "Define NAME's standby so that it boots the PE; it must be off.")
_add_act("start", "Define it if it is off, and start it.")
_add_act("stop", "Power it off.")
_add_act("remove", "Power it off, delete its domain and its disks, end its credential.")


def _request(given: dict[str, Any]) -> m.ProtectRequest:
    """Raises ``ValueError``."""
    hypervisor, source = given["hypervisor"], given["source_hypervisor"]
    if hypervisor and not (given["bridge"] and given["standby_address"]):
        raise ValueError("a standby needs --bridge and --standby-address beside --hypervisor")
    if not hypervisor and (given["bridge"] or given["standby_address"]):
        raise ValueError("--bridge and --standby-address belong to a --hypervisor")
    if bool(source) != bool(given["source_domain"]):
        raise ValueError("--source-hypervisor and --source-domain belong together")
    return m.ProtectRequest(
        # The agent reports kernel names; people write paths.
        disks=tuple(disk.removeprefix("/dev/") for disk in given["disks"]),
        service_addresses=given["service_addresses"],
        probes=given["probes"],
        quiesce=given["quiesce"],
        standby=StandbySpec(
            hypervisor=hypervisor,
            bridge=given["bridge"],
            management_address=given["standby_address"],
            gateway=given["standby_gateway"],
            memory_bytes=given["memory"],
            vcpus=given["vcpus"],
            storage_dir=given["storage_dir"],
        )
        if hypervisor
        else None,
        source_domain=SourceDomain(hypervisor=source, domain=given["source_domain"]) if source else None,
        deadlines=Deadlines(**dict(given["deadlines"])) if given["deadlines"] else None,
        silence_s=given["silence"],
        rollback_window_s=given["rollback_window"],
        automatic_rollback=given["automatic_rollback"],
        start_standby=given["start_standby"],
    )
