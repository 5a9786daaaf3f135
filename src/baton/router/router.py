"""The router: registry, monitor, policies and dialects under one roof. The gateway knows this class only."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from random import Random

from baton.base.errors import Unavailable
from baton.router import policies
from baton.router.dispatch import Dialect, Legs, Native, Parcel, Pulse, Regular, Target
from baton.router.fetch import FetchFailed, Reply, fetch
from baton.router.health import Limits
from baton.router.monitor import Monitor, Rhythm
from baton.router.origin import Origin
from baton.router.registry import Candidates, Registry, Role, Worker
from baton.router.upstream import Header, Pool

log = logging.getLogger("baton.gateway")

NOBODY: frozenset[Worker] = frozenset()


@dataclass(frozen=True, slots=True)
class RouterOptions:
    prefill_policy: str = "round_robin"
    decode_policy: str = "round_robin"
    connect_timeout: float = 2.0
    health: Rhythm = field(default_factory=Rhythm)
    breaker: Limits = field(default_factory=Limits)
    worker_headers: tuple[Header, ...] = ()
    """Sent with the gateway's own requests to workers (authorization)."""


class Router:
    """Owns the workers' connections and the tasks that watch them: `close` releases both."""

    def __init__(self, options: RouterOptions, random: Random | None = None) -> None:
        self.registry = Registry(options.breaker, self._doubted)
        self._options = options
        self._random = random or Random()  # seeded by the system
        self._loop = asyncio.get_running_loop()
        self._monitor = Monitor(self.registry, options.health, options.worker_headers)
        self._prefill_policy = policies.policy(options.prefill_policy)
        self._decode_policy = policies.policy(options.decode_policy)
        self._turn = 0
        self._dialects: dict[str, Dialect] = {
            "native": Native(self.registry, self._loop, self._random),
            "regular": Regular(self.registry, self._loop),
        }

    def add(self, url: str, role: Role, bootstrap_port: int | None = None) -> Worker:
        """Raises `ConfigError` for a bad URL, `BadRequest` if it is there already. Used as soon as it is healthy."""
        origin = Origin.parse(url)
        pool = Pool(origin, connect_timeout=self._options.connect_timeout)
        worker = self.registry.add(origin, role, bootstrap_port, pool)
        self._monitor.watch(worker)
        return worker

    async def remove(self, worker: Worker) -> None:
        """No new requests; those in flight are broken off."""
        self.registry.remove(worker, self._loop.time())
        await self._monitor.forget(worker)
        await worker.pool.close()

    async def close(self) -> None:
        """Break off everything and release every connection and task. Idempotent."""
        await self._monitor.close()
        for worker in self.registry.workers:
            await worker.pool.close()

    def choose(self, avoid: frozenset[Worker] = NOBODY) -> Target:
        """A pair if there is one, else a regular worker. Raises `Unavailable` with the reason."""
        target = self._choose(avoid)
        if target is None:
            self.registry.refresh(self._loop.time())  # a breaker's cooldown may be over
            target = self._choose(avoid)
        if target is None:
            raise Unavailable(self.missing(avoid))
        return target

    def choose_one(self, avoid: frozenset[Worker] = NOBODY) -> Target:
        """One worker for a request that is not generation: regular, else decode, else prefill. Raises `Unavailable`."""
        self.registry.refresh(self._loop.time())
        roles: tuple[Role, ...] = ("regular", "decode", "prefill")
        for role in roles:
            candidates = self._candidates(role, avoid)
            if candidates.workers:
                self._turn += 1
                return Target(candidates.workers[policies.round_robin(candidates.loads, self._turn, 0.0)])
        raise Unavailable(self.missing(avoid))

    def send(self, target: Target, parcel: Parcel, pulse: Pulse) -> Legs:
        return self._dialects[target.dialect].send(target, parcel, pulse)

    async def ask(self, worker: Worker, method: str, path: str, body: bytes = b"", timeout: float = 10.0) -> Reply:
        """One control request. Raises `FetchFailed`."""
        headers = self._options.worker_headers
        if body:
            headers = (*headers, (b"content-type", b"application/json"))
        return await fetch(worker.pool, method, path, headers=headers, body=body, timeout=timeout)

    async def ask_all(self, method: str, path: str, body: bytes = b"") -> dict[str, Reply | str]:
        """One control request to every worker; an error is its text."""
        workers = self.registry.workers

        async def one(worker: Worker) -> Reply | str:
            try:
                return await self.ask(worker, method, path, body)
            except FetchFailed as error:
                return str(error)

        return dict(zip((w.url for w in workers), await asyncio.gather(*map(one, workers)), strict=True))

    def _doubted(self, worker: Worker) -> None:
        self._monitor.nudge(worker)

    def _choose(self, avoid: frozenset[Worker]) -> Target | None:
        prefill, decode = self._candidates("prefill", avoid), self._candidates("decode", avoid)
        turn = self._turn
        self._turn = turn + 1
        if prefill.workers and decode.workers:
            p = self._prefill_policy(prefill.loads, turn, self._random.random())
            shifted = policies.decode_turn(turn, len(prefill.workers), len(decode.workers))
            d = self._decode_policy(decode.loads, shifted, self._random.random())
            return Target(decode.workers[d], prefill.workers[p])
        regular = self._candidates("regular", avoid)
        if regular.workers:
            return Target(regular.workers[self._decode_policy(regular.loads, turn, self._random.random())])
        return None

    def _candidates(self, role: Role, avoid: frozenset[Worker]) -> Candidates:
        candidates = self.registry.snapshot.of(role)
        return candidates.without(avoid) if avoid else candidates

    def missing(self, avoid: frozenset[Worker] = NOBODY) -> str:
        """Why nobody can serve, in a sentence for people."""
        workers = self.registry.workers
        if not workers:
            return "no workers are registered; add some with POST /workers"
        roles = {worker.role for worker in workers}
        if roles in ({"prefill"}, {"decode"}):
            other = "decode" if roles == {"prefill"} else "prefill"
            return f"no {other} worker is registered; a {roles.pop()} worker alone cannot serve"
        parts = []
        for worker in workers:
            if not worker.healthy:
                parts.append(f"{worker.role} {worker.url} is down ({worker.reason})")
            elif worker.breaker.opened:
                parts.append(f"{worker.role} {worker.url} has failed {worker.breaker.failures} times in a row")
            elif worker in avoid:
                parts.append(f"{worker.role} {worker.url} failed just now")
        return "not enough usable workers: " + "; ".join(parts)
