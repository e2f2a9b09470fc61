"""``cdp agent``: the parts, put together.

    run(config)
      taken over? ──► report that the system is up, nothing else
      capture attached or re-opened ─► drainer ─► raw spool ─► pipeline ─► spool ─► pusher ─► server
                                                                  ▲ orders ◄─ control ◄──────────┘

One TaskGroup owns every task: if one fails, the process ends visibly and is started again by systemd; nothing is lost,
because capture is pinned and the cursor is on tmpfs. SIGTERM and SIGINT end it in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any, Final

from cdp.agent import metrics, runtime
from cdp.agent.capture import devices as devices_
from cdp.agent.capture import pins, settle
from cdp.agent.capture.devices import Device
from cdp.agent.capture.errors import CaptureMismatch, PrivilegeMissing
from cdp.agent.capture.session import CaptureSession
from cdp.agent.capture.spool import RawSpool
from cdp.agent.client import Client
from cdp.agent.config import AgentConfig
from cdp.agent.control import Control
from cdp.agent.dedup import Asker, settled_state
from cdp.agent.dirty import Geometry
from cdp.agent.drainer import Drainer
from cdp.agent.fence import Fencer
from cdp.agent.freezing import Freezer
from cdp.agent.pipeline import Pipeline
from cdp.agent.push import BACKOFF_S, Pusher
from cdp.agent.quiesce import Quiescer
from cdp.agent.rate import Lift
from cdp.agent.rounds import Rounds
from cdp.agent.spool import Spool, check_not_protected
from cdp.agent.state import Identity, StateDir, boot_id
from cdp.agent.status import Status
from cdp.agent.takenover import system_up, takeover_id, yield_the_cpu
from cdp.agent.verbs import Orders
from journal import wire
from journal.errors import CdpError
from journal.wire import DiskInfo, Hello

log = logging.getLogger(__name__)

VERSION: Final = version("cdp-standby")


def run(config: AgentConfig) -> None:
    """Run the agent until SIGTERM or SIGINT. Raises ``CdpError`` if it cannot run at all."""
    runtime.limit_memory()
    state = StateDir(config.state_dir)
    identity = state.identity()
    takeover = takeover_id()
    if takeover is not None:
        asyncio.run(_until_signal(_run_taken_over(config, state, identity, takeover)))
        return
    runtime.prepare(config)
    asyncio.run(_until_signal(_run(config, state, identity)))


async def _until_signal(main: Coroutine[Any, Any, None]) -> None:
    task = asyncio.ensure_future(main)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await task


def check_devices(config: AgentConfig) -> list[Device]:
    """The configured disks, each of them protectable, and no spool on any of them. Raises the typed refusal."""
    found = [devices_.inspect(path) for path in config.disks]
    for device in found:
        devices_.check_protectable(device)
    protected = {(device.major, device.minor) for device in found}
    for directory in (config.runtime_dir, config.spool_dir):
        check_not_protected(directory, protected)
    return found


def detach(config: AgentConfig) -> None:
    """End the capture of a machine whose agent is stopped, and give its memory back. The next start compares
    everything with the server."""
    pins.remove(config.capture.pin_dir)
    runtime.unmount(config.runtime_dir)


def bookmark(config: AgentConfig, request: wire.BookmarkRequest) -> wire.BookmarkInfo:
    """Ask the server for a bookmark as this machine; it turns to the agent that runs here."""
    state = StateDir(config.state_dir)
    try:
        identity = state.identity()
    except PermissionError as error:
        raise PrivilegeMissing(
            f"{error.filename} cannot be read: the machine's credential is root's.", remedy="Run it as root."
        ) from error

    async def ask() -> wire.BookmarkInfo:
        async with _client(config, state, identity) as client:
            return await client.bookmark(request)

    return asyncio.run(ask())


def attach(config: AgentConfig, found: list[Device]) -> CaptureSession:
    """Re-open the pinned capture or make one. One that does not fit (another version, a resized disk) is replaced:
    the comparison that follows costs time, a refusal would cost protection."""
    pin_dir, ring_bytes = config.capture.pin_dir, config.capture.ring_bytes
    try:
        return CaptureSession.attach(found, pin_dir, ring_bytes)
    except CaptureMismatch as error:
        log.warning("%s It is replaced; everything is compared.", error.sentence)
        pins.remove(pin_dir)
        return CaptureSession.attach(found, pin_dir, ring_bytes)


async def _run(config: AgentConfig, state: StateDir, identity: Identity) -> None:
    found = check_devices(config)
    session = attach(config, found)
    status = Status(boot_id=boot_id())
    drainer = Drainer(config.capture.pin_dir, config.raw_spool_dir, runtime.raw_spool_bytes(config), status)
    try:
        async with (
            _client(config, state, identity) as client,
            asyncio.TaskGroup() as group,
        ):
            group.create_task(drainer.run(), name="drainer")
            raw = await drainer.open_spool(session.capture_id)
            with ThreadPoolExecutor(1, "worker") as worker:
                await _protect(config, state, identity, session, raw, client, status, worker)
    finally:
        session.close()


async def _protect(  # noqa: PLR0917 (composition: every part once)
    config: AgentConfig,
    state: StateDir,
    identity: Identity,
    session: CaptureSession,
    raw: RawSpool,
    client: Client,
    status: Status,
    worker: ThreadPoolExecutor,
) -> None:
    disks = [Geometry(index, device.size_bytes, device.granule_bytes) for index, device in enumerate(session.devices)]
    news = asyncio.Event()
    spool = Spool(config.spool_dir, runtime.spool_bytes(config))
    client.bucket.lift, status.sending = Lift(spool, lambda: status.quiesced), client.bucket
    paths = {index: device.path for index, device in enumerate(session.devices)}
    rounds = Rounds(
        disks,
        paths,
        losses=session,
        hashes=client,
        settled=lambda since_ns: settle.wait_settled(session.devices, since_ns),
        stored=lambda: status.stored,
        started=lambda reason: status.resyncs.update([reason]),
        worker=worker,
        bytes_per_s_max=config.copy.mb_per_s_max * 1e6,
        sending=lambda: client.bucket.bytes_per_s,
    )
    asker = Asker(client, disks, paths, status=status, worker=worker, bytes_per_s_max=config.copy.mb_per_s_max * 1e6)
    pipeline = Pipeline(
        identity.machine_id,
        disks,
        session=session,
        raw=raw,
        spool=spool,
        rounds=rounds,
        status=status,
        worker=worker,
        segment_s=config.segment_s,
        sealed=news.set,
    )
    fencer = Fencer(state)
    orders = Orders(
        state=state,
        pipeline=pipeline,
        fencer=fencer,
        quiescer=Quiescer(config.quiesce, config.runtime_dir),
        client=client,
        status=status,
        freezer=Freezer(config.bookmark, config.runtime_dir, {(d.major, d.minor) for d in session.devices}),
    )
    pusher = Pusher(
        spool,
        client,
        status,
        tip=lambda: pipeline.tip,
        superseded=orders.superseded,
        diverged=orders.diverged,
        addresses=orders.told_addresses,
        news=news,
    )
    orders.connect(pusher)
    hello = Hello(role="agent", version=VERSION, boot_id=status.boot_id, disks=_disk_infos(session))
    control = Control(
        client, orders.verbs(), hello=lambda: hello, report=status.report, trouble=lambda error: _note(status, error)
    )
    adopted = pipeline.adopt()
    spool.check_space()
    await orders.enforce_at_start()
    page = await metrics.serve(config.metrics, status, identity.name)
    # Start-up has left garbage in the oldest generation; what stays is not looked at again.
    gc.collect()
    gc.freeze()
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(pipeline.run(), name="pipeline")
            group.create_task(pusher.run(), name="pusher")
            group.create_task(control.run(), name="control")
            group.create_task(orders.watch(), name="watch")
            if not adopted and not fencer.whole:
                beginning = _begin(client, pipeline, orders, pusher, status, asker if config.copy.dedup else None)
                group.create_task(beginning, name="begin")
    finally:
        if page is not None:
            await page.cleanup()


async def _begin(  # noqa: PLR0917 (everybody who learns where the history stands)
    client: Client, pipeline: Pipeline, orders: Orders, pusher: Pusher, status: Status, asker: Asker | None
) -> None:
    """Ask the server where the history stands, and what it has already, for as long as it takes, and begin there."""
    while pipeline.tip is None:
        try:
            state = await client.state()
            status.online = True
            orders.told_addresses(state.service_addresses)
            if state.fenced:
                await orders.superseded(state)
                return
            if state.prefill == "open" and asker is not None:
                await asker.run()
            await pipeline.begin(await settled_state(client), "reboot-or-reinstalled")
            status.works("begin")
        except CdpError as error:
            status.failed("begin", error)
            await asyncio.sleep(BACKOFF_S[0] * 5)
    pusher.notify()


async def _run_taken_over(config: AgentConfig, state: StateDir, identity: Identity, takeover: str) -> None:
    """The replicated agent: report, nothing else."""
    status = Status(boot_id=boot_id())
    hello = Hello(role="agent", version=VERSION, boot_id=status.boot_id, taken_over=takeover)
    async with _client(config, state, identity) as client, asyncio.TaskGroup() as group:
        control = Control(
            client, {}, hello=lambda: hello, report=status.report, trouble=lambda error: _note(status, error)
        )
        group.create_task(control.run(), name="control")
        await system_up()
        yield_the_cpu(to_others=False)
        status.taken_over = True
        control.report_soon()


def _client(config: AgentConfig, state: StateDir, identity: Identity) -> Client:
    headers = wire.authorization(identity.credential, identity.secret)
    return Client(config.server, identity.machine, headers, state.ca_file)


def _disk_infos(session: CaptureSession) -> list[DiskInfo]:
    return [
        DiskInfo(
            index=index,
            name=device.name,
            size_bytes=device.size_bytes,
            sector_bytes=device.sector_bytes,
            serial=device.serial,
        )
        for index, device in enumerate(session.devices)
    ]


def _note(status: Status, error: CdpError | None) -> None:
    if error is None:
        status.works("control")
    else:
        status.failed("control", error)
