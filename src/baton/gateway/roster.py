"""Who may serve: workers come, renew themselves, change, and go. Owns the tasks in which they drain, and the clock by
which those go that nobody has heard of.

Every change is an `Event`, which `apply` carries out; `told` hears of those that began here, so that other processes
of the same gateway can apply them too (`baton.gateway.bus`). Expiry is no event: everybody has a clock.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable
from typing import Annotated, TypeAlias

import msgspec

from baton.base.errors import BadRequest, BatonError
from baton.router.origin import Origin
from baton.router.registry import Connector, Description, Role, Runtime, Worker
from baton.router.router import Router

log = logging.getLogger("baton.gateway")

EXPIRY_ROUND = 0.5
"""Seconds between two looks for workers that have expired."""
REMEMBERED = 1024
"""Removals that a worker's heartbeat does not undo."""

Seconds = Annotated[float, msgspec.Meta(gt=0, le=86400)]
Port = Annotated[int, msgspec.Meta(gt=0, lt=65536)]


class Removed(BatonError):
    """A worker wants to stay that somebody removed."""

    status, code = 409, "worker_removed"


class Entry(msgspec.Struct, frozen=True, tag="added"):
    """A worker is registered, or registers itself again."""

    url: str
    worker_type: Role = "regular"
    bootstrap_port: Port | None = None
    runtime: Runtime = "auto"
    connector: Connector = ""
    ttl: Seconds | None = None
    model_id: str = ""
    instance: str = ""
    labels: dict[str, str] = {}

    def description(self) -> Description:
        return Description(
            role=self.worker_type,
            bootstrap_port=self.bootstrap_port,
            runtime=self.runtime,
            connector=self.connector,
            ttl=self.ttl,
            model=self.model_id,
            instance=self.instance,
            labels=self.labels,
        )


class Change(msgspec.Struct, frozen=True, tag="changed"):
    """What may be changed of a worker that is there; None: as it is. Also its heartbeat."""

    url: str
    bootstrap_port: Port | None = None
    labels: dict[str, str] | None = None
    ttl: Seconds | None = None
    instance: str = ""


class Removal(msgspec.Struct, frozen=True, tag="removed"):
    """It gets nothing new, and is gone when what runs there is over, or after `patience` seconds."""

    url: str
    patience: float
    instance: str = ""
    """Which start of it; the next one is welcome."""


Event: TypeAlias = Entry | Change | Removal


class Roster:
    """`close` cancels what it owns; workers that drain are then the router's to close."""

    def __init__(self, router: Router) -> None:
        self.told: Callable[[Event], None] = lambda event: None
        self._router = router
        self._loop = asyncio.get_running_loop()
        self._leaving: dict[Worker, asyncio.Task[None]] = {}
        self._removed: dict[str, str] = {}
        """Instances that somebody removed, by URL."""
        self._expiry = self._loop.call_later(EXPIRY_ROUND, self._expire)

    async def close(self) -> None:
        self._expiry.cancel()
        for task in list(self._leaving.values()):
            task.cancel()
        while self._leaving:
            await asyncio.wait(list(self._leaving.values()))

    def add(self, entry: Entry) -> tuple[Worker, bool]:
        """The worker, and whether it is new. Raises `ConfigError` if its URL is none, `BadRequest` if it is taken,
        `Removed` for the heartbeat of a worker that somebody removed."""
        entry = msgspec.structs.replace(entry, url=Origin.parse(entry.url).url)
        worker, new = self._added(entry)
        self.told(entry)
        return worker, new

    def change(self, worker: Worker, change: Change) -> None:
        self._changed(worker, change)
        self.told(change)

    def remove(self, worker: Worker, patience: float) -> None:
        """Begins it. What runs there is broken off after `patience` seconds."""
        removal = Removal(worker.url, patience, worker.instance)
        self._gone(removal)
        self.told(removal)

    def apply(self, event: Event) -> None:
        """A change that began in another process. Raises nothing: that one has told whoever asked for it."""
        with contextlib.suppress(BatonError):
            if isinstance(event, Entry):
                self._added(event)
            elif isinstance(event, Removal):
                self._gone(event)
            elif (worker := self._router.registry.by_url(event.url)) is not None:
                self._changed(worker, event)

    def _added(self, entry: Entry) -> tuple[Worker, bool]:
        url, about = entry.url, entry.description()
        if about.ttl is not None and self._removed.get(url) == about.instance:
            raise Removed(f"worker {url} was removed; restart it, or register it without ttl")
        self._removed.pop(url, None)
        known = self._router.registry.by_url(url)
        if known is None:
            return self._router.add(url, about), True
        if known.role == about.role and (about.ttl is not None or known.draining):
            self._stay(known)
            self._router.renew(known, about)
            return known, False
        if about.ttl is None or known.ttl is None:
            raise BadRequest(f"worker {url} is registered already as {known.role} worker; remove it first", param="url")
        self._leave(known, 0.0)  # it was restarted in another role
        self._router.registry.remove(known, self._loop.time())
        return self._router.add(url, about), True

    def _changed(self, worker: Worker, change: Change) -> None:
        self._router.registry.amend(worker, change.bootstrap_port, change.labels)
        if worker.url not in self._removed:
            self._stay(worker)
            self._router.renew(worker, Description(worker.role, ttl=change.ttl, instance=change.instance))

    def _gone(self, removal: Removal) -> None:
        self._removed.pop(removal.url, None)
        self._removed[removal.url] = removal.instance
        if len(self._removed) > REMEMBERED:
            del self._removed[next(iter(self._removed))]
        worker = self._router.registry.by_url(removal.url)
        if worker is not None:
            self._leave(worker, removal.patience)

    def _leave(self, worker: Worker, patience: float) -> None:
        self._stay(worker)
        self._router.registry.drain(worker, self._loop.time())  # now, not when the task begins
        self._leaving[worker] = task = self._loop.create_task(self._router.remove(worker, patience))
        task.add_done_callback(lambda done: self._left(worker, done))

    def _left(self, worker: Worker, task: asyncio.Task[None]) -> None:
        if self._leaving.get(worker) is task:
            del self._leaving[worker]
        if not task.cancelled():
            log.info("%s worker %s is removed", worker.role, worker.url)

    def _stay(self, worker: Worker) -> None:
        """If it was leaving, it is not any more."""
        task = self._leaving.pop(worker, None)
        if task is not None:
            task.cancel()

    def _expire(self) -> None:
        now = self._loop.time()
        for worker in self._router.registry.workers:
            if worker.expires is not None and worker.expires < now and not worker.draining:
                log.warning("%s worker %s has not been heard of for %g s", worker.role, worker.url, worker.ttl)
                self._leave(worker, math.inf)
        self._expiry = self._loop.call_later(EXPIRY_ROUND, self._expire)
