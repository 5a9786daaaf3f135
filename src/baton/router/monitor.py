"""Looks after workers: one task each asks for `/health`, and for `/server_info` whenever it comes (back) up."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass
from typing import Any

import msgspec

from baton.router.fetch import FetchFailed, fetch
from baton.router.registry import Registry, Worker
from baton.router.upstream import Header

log = logging.getLogger("baton.gateway")

RECHECK = 0.5
"""Seconds between checks of a worker that failed the last one."""
INFO_PATHS = ("/server_info", "/get_server_info")


@dataclass(frozen=True, slots=True)
class Rhythm:
    interval: float = 2.0
    """Seconds between checks."""
    timeout: float = 5.0
    """Seconds a check may take."""
    failures: int = 2
    """Failed checks in a row that take a worker out."""


class Monitor:
    """Owns one task per worker, from `watch` to `forget` or `close`."""

    def __init__(self, registry: Registry, rhythm: Rhythm, headers: tuple[Header, ...]) -> None:
        self._registry = registry
        self._rhythm = rhythm
        self._headers = headers
        self._tasks: dict[Worker, asyncio.Task[None]] = {}
        self._nudges: dict[Worker, asyncio.Event] = {}

    def watch(self, worker: Worker) -> None:
        self._nudges[worker] = asyncio.Event()
        self._tasks[worker] = asyncio.get_running_loop().create_task(self._look_after(worker))

    def nudge(self, worker: Worker) -> None:
        """Check now: a request just failed there."""
        event = self._nudges.get(worker)
        if event is not None:
            event.set()

    async def forget(self, worker: Worker) -> None:
        self._nudges.pop(worker, None)
        task = self._tasks.pop(worker, None)
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def close(self) -> None:
        for worker in list(self._tasks):
            await self.forget(worker)

    async def _look_after(self, worker: Worker) -> None:
        failures = 0
        nudge = self._nudges[worker]
        while True:
            suspect = nudge.is_set()
            nudge.clear()
            problem = await self._problem(worker, learn=suspect or not worker.healthy)
            now = asyncio.get_running_loop().time()
            if not problem:
                failures = 0
                if not worker.healthy:
                    log.info("%s worker %s is up", worker.role, worker.url)
                self._registry.up(worker, now)
            else:
                failures += 1
                if worker.healthy and failures >= self._rhythm.failures:
                    log.warning("%s worker %s is down: %s", worker.role, worker.url, problem)
                if not worker.healthy or failures >= self._rhythm.failures:
                    self._registry.down(worker, problem, now)
            worker.pool.reap()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(self._rhythm.interval, RECHECK) if problem else self._rhythm.interval):
                    await nudge.wait()

    async def _problem(self, worker: Worker, *, learn: bool) -> str:
        """Why the worker cannot be used, "" if it can."""
        try:
            reply = await fetch(
                worker.pool, "GET", "/health", headers=self._headers, timeout=self._rhythm.timeout, limit=1 << 20
            )
            if not reply.ok:
                return f"/health answered {reply.status}"
            return await self._learn(worker) if learn else ""
        except FetchFailed as error:
            return str(error)

    async def _learn(self, worker: Worker) -> str:
        info = await self._info(worker)
        said = info.get("disaggregation_mode")
        if said in ("prefill", "decode") and worker.role != said:
            return f"registered as {worker.role} worker, but says of itself that it is a {said} worker"
        port = info.get("disaggregation_bootstrap_port")
        model = info.get("served_model_name") or info.get("model_path") or ""
        self._registry.learned(
            worker,
            instance=str(info.get("instance") or ""),
            bootstrap_port=port if worker.role == "prefill" and isinstance(port, int) else None,
            model=str(model),
        )
        return ""

    async def _info(self, worker: Worker) -> dict[str, Any]:
        """What the worker says of itself; empty if it has no such route."""
        for path in INFO_PATHS:
            reply = await fetch(worker.pool, "GET", path, headers=self._headers, timeout=self._rhythm.timeout)
            if reply.ok:
                with contextlib.suppress(msgspec.DecodeError, msgspec.ValidationError):
                    return msgspec.json.decode(reply.body, type=dict[str, Any])
                return {}
            if reply.status != 404:
                break
        return {}
