"""Puts the server together and takes it apart again.

    directory ─► CA and certificate ─► store ─► credentials ─► hub, machines, standbys, takeovers ─► HTTPS

It is closed in the other order: long polls and control channels end first, requests that have begun are answered, the
store is closed last, when nothing can ask for an acknowledgement any more.
"""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import logging
import os
import socket
import time
import uuid
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Final

from aiohttp import web
from prometheus_client import CollectorRegistry

from cdp.server import http, metrics, tls
from cdp.server.api import Api, Parts
from cdp.server.auth import Authenticator
from cdp.server.bookmarks import Bookmarks
from cdp.server.comparison import Comparisons
from cdp.server.config import Config
from cdp.server.control import Hub, Slot
from cdp.server.dedup import Prefills
from cdp.server.errors import ListenFailed, StateDirectoryInvalid
from cdp.server.exports import Exports
from cdp.server.feed import Feed
from cdp.server.ingest import Ingest
from cdp.server.join import Joining, ensure_first_operator
from cdp.server.limits import Limits
from cdp.server.machines import Machines
from cdp.server.points import PointsApi
from cdp.server.ports import StoreCalls, make_ports
from cdp.server.proof import Proof
from cdp.server.reseed import Reseeds
from cdp.server.retention import Policies, Retentions
from cdp.server.retention_messages import RetentionPolicy
from cdp.server.standbys import Standbys, Target
from cdp.server.takeovers import Takeovers, phase_seconds
from cdp.server.upkeep import Upkeep
from cdp.server.verification import Verification
from cdp.server.workers import ByteBudget, Changes, Workers
from cdp.store import Store
from cdp.store.dedup import Dedup
from journal import wire
from journal.errors import Forbidden
from journal.wire import Hello
from standby.spec import Deadlines
from standby.takeover.controller import TakeoverController

log = logging.getLogger(__name__)

METRICS: Final = "/metrics"
OPERATOR_FILE: Final = "operator.json"
SHUTDOWN_S: Final = 15.0
"""How long requests that have begun may take to end; a segment's acknowledgement takes far less."""
BACKLOG: Final = 512
"""All agents may come back at the same moment after a restart."""
RENEWAL_POLL_S: Final = 6 * 3600.0


class Server:
    """``async with Server(config, target) as server``: serves until the block ends. ``run`` is to be awaited inside of
    it: it owns the background tasks, and a defect in one of them ends it."""

    def __init__(self, config: Config, target: Target) -> None:
        self.config = config
        self.directory = Path(config.directory)
        self._target = target
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Server:
        async with AsyncExitStack() as stack:
            await self._start(stack)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.standbys.watch(), name="watch the hypervisors")
            group.create_task(self.takeovers.watch(), name="watch the rollback windows")
            group.create_task(self.limits.run(), name="tell the bandwidth limits")
            group.create_task(self._renew_certificate(), name="renew the certificate")
            group.create_task(self.verification.watch(), name="verify in the background")
            group.create_task(self.upkeep.watch(), name="watch the retention")
            group.create_task(self.exports.run(), name="end exports that nobody reads")

    async def _start(self, stack: AsyncExitStack) -> None:
        config = self.config
        # The port first: whoever dials meanwhile waits, and a port that is taken stops everything at once.
        self._sockets = [_bound(address, config.port) for address in config.listen or ("",)]
        for bound in self._sockets:
            stack.callback(bound.close)
        await asyncio.to_thread(self._open_directory)
        self.workers = Workers()
        self.store = await asyncio.to_thread(
            Store.open,
            self.directory / "store",
            file_bytes=config.store.file_bytes,
            map_bytes=config.store.map_bytes,
        )
        stack.push_async_callback(asyncio.to_thread, self.store.close)
        stack.push_async_callback(self.workers.close)
        self.auth = await asyncio.to_thread(
            Authenticator, self.store.tokens, self.store.credentials, self.authority.fingerprint, time.time
        )
        self.changes = Changes()
        self.counters = metrics.Counters()
        read_budget = ByteBudget(config.limits.read_bytes_max)
        dedup = await asyncio.to_thread(self._open_dedup)
        self.prefills = Prefills(self.store, self.workers, read_budget, self.counters, dedup)
        self.retentions = self._start_upkeep(stack)
        self.takeovers = Takeovers(self.store, self.workers)
        self.hub = Hub(peers_max=config.limits.peers_max, on_hello=self._on_hello)
        self.standbys = Standbys(
            self.store,
            self.workers,
            self.auth,
            self.hub,
            self._target,
            url=config.public_url,
            ca_pem=self.authority.pem,
            busy=self.takeovers.check_idle,
        )
        self.limits = await asyncio.to_thread(Limits, self.store, self.workers, self.hub)
        self.proof = self._make_proof(read_budget)
        self.machines = Machines(
            self.store,
            self.hub,
            takeovers=self.takeovers,
            domain_state=self.standbys.domain_state,
            prefill=self.prefills.state_of,
            allowance=self.limits.allowance,
            retention=self.retentions.status,
            proof=self.proof.status,
        )
        self.standbys.machines = self.takeovers.machines = self.machines
        calls = StoreCalls(self.store, self.workers, self.changes)
        controller = TakeoverController(calls, make_ports(self.hub, calls, self.standbys, self._deadlines))
        self.takeovers.controller = await stack.enter_async_context(controller)
        await self._serve(stack, read_budget)

    def _start_upkeep(self, stack: AsyncExitStack) -> Retentions:
        """The thread that folds, and what operators see and say of it."""
        config = self.config.retention
        default = RetentionPolicy(keep_s=config.keep_s or None, max_bytes=config.max_bytes or None)
        policies = Policies(self.store, default, self.config.store.file_bytes)
        self.upkeep = Upkeep(self.store, policies.of, interval_s=config.interval_s)
        self.upkeep.start()
        stack.push_async_callback(self.upkeep.close)
        return Retentions(self.store, self.workers, policies, self.upkeep)

    def _make_proof(self, budget: ByteBudget) -> Proof:
        """Verification, comparisons, and standbys that have to be compared."""
        store, workers = self.store, self.workers
        self.verification = Verification(store, workers, self.changes, self.hub, self.config.verify)
        self.comparisons = Comparisons(store, workers, self.hub, check=self._check_comparable)
        self.reseeds = Reseeds(store)
        return Proof(
            store,
            workers,
            self.changes,
            budget,
            verification=self.verification,
            comparisons=self.comparisons,
            reseeds=self.reseeds,
        )

    def _check_comparable(self, machine: uuid.UUID) -> None:
        self.machines.require_spec(machine)
        self.takeovers.check_idle(machine)

    def _open_directory(self) -> None:
        """The directory, the CA and the certificate."""
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            now = datetime.datetime.now(datetime.UTC)
            self.authority = tls.open_authority(self.directory / "tls", now)
            self._certificate, _ = tls.ensure_certificate(self.authority, self.config.names, self._lifetime, now)
        except OSError as error:
            raise StateDirectoryInvalid(
                f"{self.directory} cannot be used: {error}.",
                remedy="Give the server a directory of its own with 'directory' in its configuration, and run as root.",
                directory=str(self.directory),
            ) from error
        self._ssl = tls.server_context(self._certificate)

    def _open_dedup(self) -> Dedup | None:
        """Hints beside the store: they are not part of what has to be kept."""
        config = self.config.dedup
        if not config.enabled:
            return None
        found = Dedup(self.store, self.directory / "chunks", bytes_per_s_max=config.index_mb_per_s_max * 1e6)
        found.start()
        return found

    async def _serve(self, stack: AsyncExitStack, read_budget: ByteBudget) -> None:
        config, limits = self.config, self.config.limits
        app = web.Application(middlewares=[http.errors_as_answers])
        gate = http.Gate(app, self.auth)
        self.joining = Joining(
            self.store,
            self.workers,
            self.auth,
            self.authority,
            url=config.public_url,
            token_lifetime_s=config.token_lifetime_s,
        )
        ingest_budget = ByteBudget(limits.ingest_bytes_max)
        feed = Feed(
            self.store,
            self.workers,
            self.changes,
            read_budget,
            self.machines,
            wait_s_max=limits.feed_wait_s_max,
            reseeds=self.reseeds,
            damaged=self.verification.damaged_segments,
        )
        ingest = Ingest(
            self.store,
            self.workers,
            self.changes,
            ingest_budget,
            self.counters,
            request_idle_s=limits.request_idle_s,
            came=self.limits.came,
        )
        self.exports = Exports(self.store, self.workers, read_budget)
        await self.exports.start()
        stack.push_async_callback(self.exports.close)
        parts = Parts(
            store=self.store,
            workers=self.workers,
            changes=self.changes,
            auth=self.auth,
            joining=self.joining,
            hub=self.hub,
            machines=self.machines,
            standbys=self.standbys,
            counters=self.counters,
        )
        self.joining.add_routes(gate)
        ingest.add_routes(gate)
        feed.add_routes(gate)
        self.prefills.add_routes(gate)
        self.proof.add_routes(gate)
        self.limits.add_routes(gate)
        self.exports.add_routes(gate)
        PointsApi(self.store, self.workers).add_routes(gate)
        Api(parts, url=config.public_url, fingerprint=self.authority.fingerprint).add_routes(gate)
        self.retentions.add_routes(gate)
        self.takeovers.add_routes(gate)
        Bookmarks(self.store, self.workers, self.hub, self.machines, self.takeovers.check_idle).add_routes(gate)
        gate.add("GET", wire.CONTROL, self._control, "agent", "pe")
        gate.open("GET", METRICS, self._metrics)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_S)
        await runner.setup()
        stack.push_async_callback(self.verification.close)
        stack.push_async_callback(self.comparisons.close)
        stack.push_async_callback(runner.cleanup)
        stack.push_async_callback(self.hub.close)
        stack.callback(feed.close)
        for bound in self._sockets:
            await web.SockSite(runner, bound, ssl_context=self._ssl, backlog=BACKLOG).start()
        self.port: int = runner.addresses[0][1]
        path = self.directory / OPERATOR_FILE
        if await self.workers.write(ensure_first_operator, self.auth, self.store, self.authority, path, self.port):
            log.info("the first operator's credential is in %s", path)

    # --- control ------------------------------------------------------------------------------------------------------
    async def _control(self, request: web.Request) -> web.StreamResponse:
        principal = request[http.PRINCIPAL]
        assert principal.machine is not None
        return await self.hub.serve(request, principal.machine, principal.role)

    async def _on_hello(self, machine: uuid.UUID, slot: Slot, hello: Hello) -> None:
        if slot == "agent":
            await self.workers.write(self.machines.report_disks, machine, hello.disks)
        if slot == "taken-over":
            newest = self.takeovers.newest(machine)
            if newest is None or newest["id"] != hello.taken_over:
                raise Forbidden(
                    "This machine says that a takeover made it which is not the newest one.",
                    remedy="An old copy of the standby is running: shut it down.",
                    takeover=hello.taken_over,
                )
        await self.takeovers.peer_connected(machine)

    # --- metrics ------------------------------------------------------------------------------------------------------
    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        if not _is_loopback(request.remote):
            self.auth.authenticate(request.headers.get("Authorization")).require_role("operator")
        body = await self.workers.read(self._render_metrics)
        return web.Response(body=body, headers={"Content-Type": metrics.CONTENT_TYPE})

    def _render_metrics(self) -> bytes:
        gauges = CollectorRegistry()
        gauges.register(metrics.StatusCollector(self.machines.all, phase_seconds))
        gauges.register(self.limits)
        return metrics.render(gauges, self.counters.registry)

    # --- background ---------------------------------------------------------------------------------------------------
    async def _renew_certificate(self) -> None:
        while True:
            await asyncio.sleep(RENEWAL_POLL_S)
            await self.renew_certificate()

    async def renew_certificate(self) -> bool:
        """Issue the certificate anew if it is due; connections from now on get it. Tells whether it was."""
        now = datetime.datetime.now(datetime.UTC)
        path, renewed = await asyncio.to_thread(
            tls.ensure_certificate, self.authority, self.config.names, self._lifetime, now
        )
        if renewed:
            await asyncio.to_thread(self._ssl.load_cert_chain, path)
            log.info("the server's certificate was renewed")
        return renewed

    @property
    def _lifetime(self) -> datetime.timedelta:
        return datetime.timedelta(days=self.config.tls.certificate_days)

    def _deadlines(self, machine: uuid.UUID) -> Deadlines:
        """A takeover under way keeps those that it began with."""
        assert self.takeovers.controller is not None
        record = self.takeovers.controller.latest(str(machine))
        return Deadlines() if record is None else record.spec.deadlines


def _bound(address: str, port: int) -> socket.socket:
    """A listening socket; "" is every address, of both families where there are two. Raises ``ListenFailed``."""
    try:
        if address == "" and socket.has_dualstack_ipv6():
            return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=BACKLOG)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return socket.create_server((address, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ListenFailed(
            f"The server cannot listen at {address or 'any address'}, port {port}: {os.strerror(error.errno or 0)}.",
            remedy="Another program may hold the port; change 'listen' or 'port' in the configuration.",
            port=port,
        ) from error


def initialise(config: Config) -> Path:
    """Make the CA, the store and the first operator's credential without serving; returns the credential's file.
    Blocks. Raises ``StoreLocked`` if the server is running."""
    directory = Path(config.directory)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    authority = tls.open_authority(directory / "tls", datetime.datetime.now(datetime.UTC))
    with Store.open(directory / "store", file_bytes=config.store.file_bytes, map_bytes=config.store.map_bytes) as store:
        auth = Authenticator(store.tokens, store.credentials, authority.fingerprint, time.time)
        ensure_first_operator(auth, store, authority, directory / OPERATOR_FILE, config.port)
    return directory / OPERATOR_FILE


def _is_loopback(remote: str | None) -> bool:
    try:
        address = ipaddress.ip_address((remote or "").partition("%")[0])
    except ValueError:
        return False
    # On a socket of both families IPv4 peers appear as ::ffff:127.0.0.1.
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback
