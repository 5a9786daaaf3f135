"""Who is there: workers by URL, and an immutable snapshot of those that may be used now.

The snapshot changes only when a worker comes, goes, falls ill or recovers; loads are counted at dispatch, in tokens, in
lists that the policies read directly. No I/O and no clock in here.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from baton.base.errors import BadRequest, NotFound
from baton.router import health
from baton.router.health import Breaker, Limits
from baton.router.origin import Origin
from baton.router.upstream import Pool

Role = Literal["prefill", "decode", "regular"]
ROLES: tuple[Role, ...] = ("prefill", "decode", "regular")


@dataclass(slots=True, eq=False)
class Worker:
    """One worker as the gateway knows it. Changed only by `Registry`."""

    origin: Origin
    role: Role
    pool: Pool
    bootstrap_port: int | None = None
    """As configured, else as the worker says; None: the worker's own default."""
    id: str = ""
    instance: str = ""
    """What the worker calls this start of itself; a restarted worker is another instance."""
    revision: int = 0
    """How many instances have been seen at this URL."""
    model: str = ""
    healthy: bool = False
    reason: str = "not checked yet"
    """Why it is not healthy; "" if it is."""
    breaker: Breaker = health.CLOSED
    load: int = 0
    """Tokens in flight, estimated at dispatch."""
    in_flight: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    _loads: list[int] = field(default_factory=lambda: [0])
    _slot: int = 0

    @property
    def url(self) -> str:
        return self.origin.url

    def __repr__(self) -> str:
        return (
            f"<Worker {self.role} {self.url} {'healthy' if self.healthy else self.reason}, {self.in_flight} in flight>"
        )


@dataclass(frozen=True, slots=True)
class Candidates:
    """Workers of one role that may be used now, and their loads in the same order (live)."""

    workers: tuple[Worker, ...] = ()
    loads: list[int] = field(default_factory=list)

    def without(self, avoid: frozenset[Worker]) -> Candidates:
        kept = [(w, load) for w, load in zip(self.workers, self.loads, strict=True) if w not in avoid]
        return Candidates(tuple(w for w, _ in kept), [load for _, load in kept])


@dataclass(frozen=True, slots=True)
class Snapshot:
    prefill: Candidates = Candidates()
    decode: Candidates = Candidates()
    regular: Candidates = Candidates()

    def of(self, role: Role) -> Candidates:
        found: Candidates = getattr(self, role)
        return found


class Registry:
    """The only one who changes workers."""

    def __init__(self, limits: Limits, doubted: Callable[[Worker], None]) -> None:
        self.snapshot = Snapshot()
        self.doubted = doubted
        """Called when a worker should be looked at: a request was lost there."""
        self._limits = limits
        self._workers: dict[str, Worker] = {}

    @property
    def workers(self) -> tuple[Worker, ...]:
        return tuple(self._workers.values())

    def add(self, origin: Origin, role: Role, bootstrap_port: int | None, pool: Pool) -> Worker:
        """A new worker, not used before it is found healthy. Raises `BadRequest` if its URL is taken."""
        if origin.url in self._workers:
            raise BadRequest(f"worker {origin.url} is registered already; remove it first", param="url")
        worker = Worker(origin, role, pool, bootstrap_port, id=str(uuid.uuid5(uuid.NAMESPACE_URL, origin.url)))
        self._workers[origin.url] = worker
        return worker

    def remove(self, worker: Worker, now: float) -> None:
        self._workers.pop(worker.url, None)
        self.refresh(now)

    def find(self, id_or_url: str) -> Worker:
        """Raises `NotFound`."""
        for worker in self._workers.values():
            if id_or_url in (worker.id, worker.url):
                return worker
        raise NotFound(f"no worker {id_or_url!r}; GET /workers lists them")

    def learned(self, worker: Worker, instance: str, bootstrap_port: int | None, model: str) -> None:
        """What the worker says of itself."""
        if worker.revision == 0 or (instance and instance != worker.instance):
            worker.revision += 1
        worker.instance, worker.model = instance, model
        if worker.bootstrap_port is None:
            worker.bootstrap_port = bootstrap_port

    def up(self, worker: Worker, now: float) -> None:
        if worker.healthy and not worker.breaker.opened:
            return  # the usual case: nothing has changed
        if not worker.healthy:
            worker.healthy, worker.reason, worker.breaker = True, "", health.CLOSED
        self.refresh(now)

    def down(self, worker: Worker, reason: str, now: float) -> None:
        worker.healthy, worker.reason = False, reason
        self.refresh(now)

    def refresh(self, now: float) -> None:
        """Make a new snapshot if the set of usable workers has changed (breakers change with time)."""
        usable: dict[Role, list[Worker]] = {role: [] for role in ROLES}
        for worker in self._workers.values():
            if worker.healthy and health.allows(worker.breaker, now):
                usable[worker.role].append(worker)
        if any(tuple(usable[role]) != self.snapshot.of(role).workers for role in ROLES):
            self.snapshot = Snapshot(*(self._candidates(usable[role]) for role in ROLES))

    def charge(self, worker: Worker, tokens: int, now: float) -> None:
        """A request of about `tokens` tokens was sent to `worker`."""
        worker.in_flight += 1
        worker.load += tokens
        worker._loads[worker._slot] = worker.load
        if worker.breaker.opened:
            worker.breaker = health.tried(worker.breaker, now, self._limits)
            self.refresh(now)

    def discharge(self, worker: Worker, tokens: int) -> None:
        """That request is over."""
        worker.in_flight -= 1
        worker.load -= tokens
        worker._loads[worker._slot] = worker.load

    def succeeded(self, worker: Worker, now: float) -> None:
        if worker.breaker is not health.CLOSED:
            worker.breaker = health.CLOSED
            self.refresh(now)

    def failed(self, worker: Worker, kind: str, now: float) -> None:
        """A request failed through the worker's fault."""
        worker.errors[kind] = worker.errors.get(kind, 0) + 1
        worker.breaker = health.failed(worker.breaker, now, self._limits)
        self.doubted(worker)
        if worker.breaker.opened:
            self.refresh(now)

    @staticmethod
    def _candidates(workers: list[Worker]) -> Candidates:
        loads = [worker.load for worker in workers]
        for slot, worker in enumerate(workers):
            worker._loads, worker._slot = loads, slot
        return Candidates(tuple(workers), loads)
