"""Who is there: workers by URL, and an immutable snapshot of those that may be used now.

The snapshot changes only when a worker comes, goes, falls ill or recovers; loads are counted at dispatch, in tokens, in
lists that the policies read directly. No I/O and no clock in here.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from baton.base.errors import BadRequest, NotFound
from baton.router import health
from baton.router.health import Breaker, Limits
from baton.router.origin import Origin
from baton.router.policies import View
from baton.router.upstream import Pool

Role = Literal["prefill", "decode", "regular"]
ROLES: tuple[Role, ...] = ("prefill", "decode", "regular")
Runtime = Literal["auto", "baton", "sglang", "vllm"]
RUNTIMES: tuple[Runtime, ...] = ("auto", "baton", "sglang", "vllm")
Connector = Literal["", "nixl", "nixl-push", "mooncake"]
"""How vLLM's workers hand over KV cache; it decides what they must be told."""
CONNECTORS: tuple[Connector, ...] = ("", "nixl", "nixl-push", "mooncake")


@dataclass(frozen=True, slots=True)
class Description:
    """A worker as whoever registers it describes it."""

    role: Role = "regular"
    bootstrap_port: int | None = None
    """None: the worker's own default."""
    runtime: Runtime = "auto"
    """Auto: found out by asking it."""
    connector: Connector = ""
    ttl: float | None = None
    """Seconds after which it is taken out unless it is heard of again (self-registration). None: it stays."""
    model: str = ""
    """What it is asked for by; "": what it says of itself."""
    instance: str = ""
    """Which start of the worker registers itself; "": not said."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """For people; nothing is decided by them."""


@dataclass(frozen=True, slots=True)
class Facts:
    """A worker as it describes itself."""

    runtime: Runtime
    instance: str = ""
    model: str = ""
    bootstrap_port: int | None = None


@dataclass(slots=True, eq=False)
class Worker:
    """One worker as the gateway knows it. Changed only by `Registry`."""

    origin: Origin
    pool: Pool
    role: Role
    bootstrap_port: int | None
    """As configured, else as the worker says; None: the worker's own default."""
    runtime: Runtime
    connector: Connector
    id: str = ""
    instance: str = ""
    """What the worker calls this start of itself; a restarted worker is another instance."""
    revision: int = 0
    """How many instances have been seen at this URL."""
    model: str = ""
    named: bool = False
    """The model's name was given by whoever registered it."""
    labels: Mapping[str, str] = field(default_factory=dict)
    healthy: bool = False
    reason: str = "not checked yet"
    """Why it is not healthy; "" if it is."""
    draining: bool = False
    """It gets no more requests, and is removed when it has none left."""
    ttl: float | None = None
    """Seconds it stays without being heard of; None: for ever."""
    expires: float | None = None
    """When it is taken out, unless it is heard of again."""
    seen: float = 0.0
    """When it was last healthy."""
    breaker: Breaker = health.CLOSED
    load: int = 0
    """Tokens in flight, estimated at dispatch."""
    in_flight: int = 0
    prefilling: int = 0
    """Prompt tokens of whole requests that have not begun to answer: what it prefills itself."""
    trips: int = 0
    """How often its breaker opened."""
    pairs: int = 0
    """Pairs it was the decode side of."""
    served: int = 0
    """Requests (legs) that went well."""
    errors: dict[str, int] = field(default_factory=dict)
    _loads: list[int] = field(default_factory=lambda: [0])
    _slot: int = 0

    @property
    def url(self) -> str:
        return self.origin.url

    @property
    def name(self) -> str:
        """For clients, who have no business with addresses: `decode-3f2a`."""
        return f"{self.role}-{self.id[:4]}"

    @property
    def alone(self) -> bool:
        """It can serve a request without a partner. SGLang's decode workers cannot."""
        return self.role == "regular" or (self.role == "decode" and self.runtime in ("baton", "vllm"))

    def __repr__(self) -> str:
        state = "draining" if self.draining else "healthy" if self.healthy else self.reason
        return f"<Worker {self.role} {self.url} {state}, {self.in_flight} in flight>"


@dataclass(frozen=True, slots=True)
class Candidates:
    """Workers that may be used now, and how the policies see them: in the same order, loads live."""

    workers: tuple[Worker, ...] = ()
    view: View = field(default_factory=lambda: View((), []))

    def without(self, avoid: frozenset[Worker]) -> Candidates:
        kept = [index for index, worker in enumerate(self.workers) if worker not in avoid]
        if len(kept) == len(self.workers):
            return self
        ids, loads = self.view.ids, self.view.loads
        view = View(tuple(ids[index] for index in kept), [loads[index] for index in kept])
        return Candidates(tuple(self.workers[index] for index in kept), view)


EMPTY = Candidates()


@dataclass(frozen=True, slots=True)
class Fleet:
    """The usable workers of one model."""

    answering: Candidates = EMPTY
    """Whoever can give the answer: regular workers, and decode workers that have a partner or can do without."""
    prefill: dict[Runtime, Candidates] = field(default_factory=dict)
    """Who can prefill for decode workers of the same runtime."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    workers: tuple[Worker, ...] = ()
    """All that are usable."""
    fleets: dict[str, Fleet] = field(default_factory=dict)
    """By model."""

    def of(self, role: Role) -> tuple[Worker, ...]:
        return tuple(worker for worker in self.workers if worker.role == role)


class Registry:
    """The only one who changes workers."""

    def __init__(self, limits: Limits, doubted: Callable[[Worker], None]) -> None:
        self.snapshot = Snapshot()
        self.doubted = doubted
        """Called when a worker should be looked at: a request was lost there."""
        self.changed: Callable[[], None] = lambda: None
        """Called after every change of the snapshot."""
        self._limits = limits
        self._workers: dict[str, Worker] = {}
        self._seen: tuple[tuple[Worker, str, Runtime], ...] = ()
        """What the snapshot was made of."""

    @property
    def workers(self) -> tuple[Worker, ...]:
        return tuple(self._workers.values())

    def add(self, origin: Origin, about: Description, pool: Pool, now: float) -> Worker:
        """A new worker, not used before it is found healthy. Raises `BadRequest` if its URL is taken."""
        if origin.url in self._workers:
            raise BadRequest(f"worker {origin.url} is registered already; remove it first", param="url")
        worker = Worker(origin, pool, about.role, about.bootstrap_port, about.runtime, about.connector)
        worker.id = str(uuid.uuid5(uuid.NAMESPACE_URL, origin.url))
        worker.model, worker.named = about.model, bool(about.model)
        worker.instance, worker.labels, worker.ttl = about.instance, about.labels, about.ttl
        worker.expires = None if about.ttl is None else now + about.ttl
        self._workers[origin.url] = worker
        return worker

    def drain(self, worker: Worker, now: float) -> None:
        """No new requests; those in flight go on."""
        worker.draining = True
        self.refresh(now)

    def keep(self, worker: Worker, now: float) -> None:
        """It shall stay after all: `drain` is taken back."""
        worker.draining = False
        self.refresh(now)

    def renewed(self, worker: Worker, ttl: float | None, now: float) -> None:
        """It was heard of again. One that was registered to stay does not begin to expire by this."""
        if worker.ttl is not None:
            worker.ttl = ttl or worker.ttl
            worker.expires = now + worker.ttl

    def amend(self, worker: Worker, bootstrap_port: int | None, labels: Mapping[str, str] | None) -> None:
        """What whoever registered it wants otherwise; None: as it is."""
        if bootstrap_port is not None:
            worker.bootstrap_port = bootstrap_port
        if labels is not None:
            worker.labels = labels

    def remove(self, worker: Worker, now: float) -> None:
        if self._workers.get(worker.url) is worker:  # there may be another one at this address by now
            del self._workers[worker.url]
        self.refresh(now)

    def find(self, id_or_url: str) -> Worker:
        """Raises `NotFound`."""
        for worker in self._workers.values():
            if id_or_url in (worker.id, worker.url):
                return worker
        raise NotFound(f"no worker {id_or_url!r}; GET /workers lists them")

    def by_url(self, url: str) -> Worker | None:
        return self._workers.get(url)

    def learned(self, worker: Worker, facts: Facts) -> bool:
        """What the worker says of itself. True if it is another start of it than before. `up` follows."""
        another = self.restarted(worker, facts.instance)
        if worker.revision == 0:
            worker.revision, worker.instance = 1, facts.instance
        if not worker.named:
            worker.model = facts.model
        if worker.runtime == "auto":
            worker.runtime = facts.runtime
        self._seen = ()  # look again
        if worker.bootstrap_port is None and worker.role == "prefill":
            worker.bootstrap_port = facts.bootstrap_port
        return another

    def restarted(self, worker: Worker, instance: str) -> bool:
        """True if this is another start of it than the one that was known: nothing is held against that."""
        if worker.revision == 0 or not instance or instance == worker.instance:
            return False
        worker.revision += 1
        worker.instance, worker.breaker = instance, health.CLOSED
        self._seen = ()
        return True

    def up(self, worker: Worker, now: float) -> None:
        worker.seen = now
        if worker.healthy and not worker.breaker.opened and self._seen:
            return  # the usual case: nothing has changed
        if not worker.healthy:
            worker.healthy, worker.reason, worker.breaker = True, "", health.CLOSED
        self.refresh(now)

    def down(self, worker: Worker, reason: str, now: float) -> None:
        worker.healthy, worker.reason = False, reason
        self.refresh(now)

    def refresh(self, now: float) -> None:
        """Make a new snapshot if the set of usable workers has changed (breakers change with time)."""
        usable = tuple(
            worker
            for worker in self._workers.values()
            if worker.healthy and not worker.draining and health.allows(worker.breaker, now)
        )
        seen = tuple((worker, worker.model, worker.runtime) for worker in usable)
        if seen == self._seen:
            return
        self._seen = seen
        models: dict[str, list[Worker]] = {}
        for worker in usable:
            models.setdefault(worker.model, []).append(worker)
        self.snapshot = Snapshot(usable, {model: _fleet(workers) for model, workers in models.items()})
        self.changed()

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
        worker.served += 1
        if worker.breaker is not health.CLOSED:
            worker.breaker = health.CLOSED
            self.refresh(now)

    def noted(self, worker: Worker, kind: str) -> None:
        """Something was not as it should be, and went on nevertheless."""
        worker.errors[kind] = worker.errors.get(kind, 0) + 1

    def failed(self, worker: Worker, kind: str, now: float) -> None:
        """A request failed through the worker's fault."""
        worker.errors[kind] = worker.errors.get(kind, 0) + 1
        opened = worker.breaker.opened
        worker.breaker = health.failed(worker.breaker, now, self._limits)
        worker.trips += worker.breaker.opened > opened
        self.doubted(worker)
        if worker.breaker.opened:
            self.refresh(now)


def _fleet(workers: list[Worker]) -> Fleet:
    prefill: dict[Runtime, list[Worker]] = {}
    for worker in workers:
        if worker.role == "prefill":
            prefill.setdefault(worker.runtime, []).append(worker)
    answering = [w for w in workers if w.role != "prefill" and (w.alone or w.runtime in prefill)]
    return Fleet(_candidates(answering), {runtime: _candidates(some) for runtime, some in prefill.items()})


def _candidates(workers: list[Worker]) -> Candidates:
    loads = [worker.load for worker in workers]
    for slot, worker in enumerate(workers):
        worker._loads, worker._slot = loads, slot
    return Candidates(tuple(workers), View(tuple(worker.id for worker in workers), loads))
