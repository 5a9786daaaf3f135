"""The router: registry, monitor, policies and dialects under one roof. The gateway knows this class only."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from baton.base.errors import Unavailable
from baton.router.ask import Ask
from baton.router.call import Header
from baton.router.dialects.native import Native
from baton.router.dialects.vllm import Vllm
from baton.router.dialects.whole import Whole
from baton.router.fetch import FetchFailed, Reply, fetch
from baton.router.health import Limits
from baton.router.legs import Legs, Pulse
from baton.router.monitor import Monitor, Rhythm
from baton.router.origin import Origin
from baton.router.planner import Planner, PlannerOptions
from baton.router.registry import Description, Registry, Role, Runtime, Worker
from baton.router.target import Dialect, Parcel, Target
from baton.router.upstream import Pool

log = logging.getLogger("baton.gateway")

NOBODY: frozenset[Worker] = frozenset()
HOPE_SECONDS = 30.0
"""A worker that was healthy so recently may come back."""


@dataclass(frozen=True, slots=True)
class RouterOptions:
    planner: PlannerOptions = field(default_factory=PlannerOptions)
    connect_timeout: float = 2.0
    health: Rhythm = field(default_factory=Rhythm)
    breaker: Limits = field(default_factory=Limits)
    worker_headers: tuple[Header, ...] = ()
    """Sent with the gateway's own requests to workers (authorization)."""


class Router:
    """Owns the workers' connections and the tasks that watch them: `close` releases both."""

    def __init__(self, options: RouterOptions, random: Random | None = None) -> None:
        self._options = options
        self._random = random or Random()  # seeded by the system
        self._loop = asyncio.get_running_loop()
        self.registry = Registry(options.breaker, self._doubted)
        self.registry.changed = self._changed
        self._watchers: list[Callable[[], None]] = []
        self._monitor = Monitor(self.registry, options.health, options.worker_headers, self._forget)
        self.planner = Planner(self.registry, options.planner, self._random)
        self._turn = 0
        self._waiting: set[Pulse] = set()
        self._whole: Dialect = Whole(self.registry, self._loop)
        native = Native(self.registry, self._loop, self._random)
        self._vllm = Vllm(self.registry, self._loop, self._random, options.connect_timeout)
        self._pairs: dict[Runtime, Dialect] = {"baton": native, "sglang": native, "vllm": self._vllm}

    def add(self, url: str, about: Description) -> Worker:
        """Raises `ConfigError` for a bad URL, `BadRequest` if it is there already. Used as soon as it is healthy."""
        origin = Origin.parse(url)
        pool = Pool(origin, connect_timeout=self._options.connect_timeout)
        worker = self.registry.add(origin, about, pool, self._loop.time())
        self._monitor.watch(worker)
        return worker

    async def remove(self, worker: Worker, patience: float = 0.0) -> None:
        """No new requests; those in flight have `patience` seconds, then they are broken off. Cancelled before that,
        it leaves the worker where it is."""
        self.registry.drain(worker, self._loop.time())
        until = self._loop.time() + patience
        while worker.in_flight and self._loop.time() < until:
            await asyncio.sleep(0.02)
        self.registry.remove(worker, self._loop.time())
        self._forget(worker)
        try:
            await self._monitor.forget(worker)
        finally:
            await worker.pool.close()

    def renew(self, worker: Worker, about: Description) -> None:
        """It registers itself again: it lives, perhaps as another start of it, and is to stay."""
        now = self._loop.time()
        self.registry.renewed(worker, about.ttl, now)
        if self.registry.restarted(worker, about.instance):
            log.info("%s worker %s was restarted", worker.role, worker.url)
            self._forget(worker)
            self._monitor.nudge(worker)
        self.registry.keep(worker, now)

    async def close(self) -> None:
        """Break off everything and release every connection and task. Idempotent."""
        await self._monitor.close()
        await self._vllm.close()
        for worker in self.registry.workers:
            await worker.pool.close()

    def plan(self, ask: Ask, model: str, avoid: frozenset[Worker] = NOBODY, runtime: Runtime = "auto") -> Target:
        """Who shall serve. `avoid`: workers that failed this request already; `runtime`: only such workers will do.
        Raises `Unavailable` with the reason, `NotFound` if nobody has the model."""
        target = self.planner.plan(ask, model, avoid, runtime)
        if target is None:
            self.registry.refresh(self._loop.time())  # a breaker's cooldown may be over
            target = self.planner.plan(ask, model, avoid, runtime)
        if target is None:
            raise Unavailable(self.missing(avoid))
        return target

    def plan_one(self, avoid: frozenset[Worker] = NOBODY, model: str = "") -> Target:
        """One worker for a request that is not generation: regular, else decode, else prefill. Of those that serve
        `model`, if any do. Raises `Unavailable`."""
        self.registry.refresh(self._loop.time())
        roles: tuple[Role, ...] = ("regular", "decode", "prefill")
        for role in roles:
            workers = [worker for worker in self.registry.snapshot.of(role) if worker not in avoid]
            workers = [worker for worker in workers if worker.model == model] or workers
            if workers:
                self._turn += 1
                return Target(workers[self._turn % len(workers)])
        raise Unavailable(self.missing(avoid))

    def send(self, target: Target, parcel: Parcel, pulse: Pulse) -> Legs:
        """Raises nothing: whatever happens is told to the legs."""
        dialect = self._whole if target.prefill is None else self._pairs[target.answering.runtime]
        return dialect.send(target, parcel, pulse)

    def hopeful(self) -> bool:
        """There may be a usable worker soon: one was healthy just now, or has not been looked at yet."""
        horizon = self._loop.time() - HOPE_SECONDS
        return any(worker.seen > horizon or worker.revision == 0 for worker in self.registry.workers)

    async def change(self, pulse: Pulse, seconds: float) -> None:
        """Until the usable workers change, for `seconds` at most. Raises `ClientGone` or `TimedOut`."""
        self._waiting.add(pulse)
        timer = self._loop.call_later(seconds, pulse.ring)
        try:
            await pulse.wait()
        finally:
            timer.cancel()
            self._waiting.discard(pulse)

    async def ask(self, worker: Worker, method: str, path: str, body: bytes = b"", timeout: float = 10.0) -> Reply:
        """One control request. Raises `FetchFailed`."""
        headers = self._options.worker_headers
        if body:
            headers = (*headers, (b"content-type", b"application/json"))
        return await fetch(worker.pool, method, path, headers=headers, body=body, timeout=timeout)

    async def ask_all(self, method: str, path: str, body: bytes = b"") -> dict[Worker, Reply | str]:
        """One control request to every worker; an error is its text."""
        workers = self.registry.workers

        async def one(worker: Worker) -> Reply | str:
            try:
                return await self.ask(worker, method, path, body)
            except FetchFailed as error:
                return str(error)

        return dict(zip(workers, await asyncio.gather(*map(one, workers)), strict=True))

    def _doubted(self, worker: Worker) -> None:
        self._monitor.nudge(worker)

    def watch(self, watcher: Callable[[], None]) -> None:
        """Call it after every change of the usable workers."""
        self._watchers.append(watcher)

    def _changed(self) -> None:
        self._vllm.directory.keep(self.registry.snapshot.workers)
        for watcher in self._watchers:
            watcher()
        for pulse in self._waiting:
            pulse.ring()

    def _forget(self, worker: Worker) -> None:
        self.planner.forget(worker)

    def missing(self, avoid: frozenset[Worker] = NOBODY, *, addresses: bool = False) -> str:
        """Why nobody can serve, in a sentence for people. `addresses`: for operators, who may know them."""
        workers = self.registry.workers
        if not workers:
            return "no workers are registered; add some with POST /workers"
        roles = {worker.role for worker in workers}
        if roles in ({"prefill"}, {"decode"}) and not any(worker.alone for worker in workers if worker.healthy):
            other = "decode" if roles == {"prefill"} else "prefill"
            if all(worker.healthy for worker in workers):
                return f"no {other} worker is registered; a {roles.pop()} worker alone cannot serve"
        parts = []
        for worker in workers:
            who = f"{worker.role} {worker.url}" if addresses else worker.name
            if not worker.healthy:
                parts.append(f"{who} is down ({worker.reason})")
            elif worker.draining:
                parts.append(f"{who} is being removed")
            elif worker.breaker.opened:
                parts.append(f"{who} has failed {worker.breaker.failures} times in a row")
            elif worker in avoid:
                parts.append(f"{who} failed just now")
        return "not enough usable workers: " + "; ".join(parts)
