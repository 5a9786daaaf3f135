"""Looks after workers: one task each asks for `/health`, and for `/server_info` whenever it comes (back) up.

A worker that dies closes its connections, and its requests fail by themselves. One that hangs (a stopped process, a
lost machine) does not: it is known by its silence, and what runs there is broken off.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from baton.router.call import Header
from baton.router.fetch import FetchFailed, Silence, fetch
from baton.router.registry import Facts, Registry, Runtime, Worker

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
    """Failed checks in a row that take a worker out; if none of them got any answer, it hangs."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a worker cannot be used."""

    reason: str
    silent: bool = False
    """It did not answer at all, not even with a refusal."""


class Record:
    """The checks since the last good one."""

    def __init__(self, limit: int) -> None:
        self.failures = 0
        self._silences: deque[float] = deque(maxlen=max(1, limit))
        """When the last checks were asked, if all of them since then met with silence."""

    def good(self) -> None:
        self.failures = 0
        self._silences.clear()

    def bad(self, problem: Problem, asked: float) -> None:
        self.failures += 1
        if problem.silent:
            self._silences.append(asked)
        else:
            self._silences.clear()

    def hangs(self, heard: float) -> bool:
        """Not a byte came (`heard`: the last time) while `limit` checks in a row were waited for. A worker that is
        only too busy for checks goes on with its streams."""
        return len(self._silences) == self._silences.maxlen and heard < self._silences[0]


class Monitor:
    """Owns one task per worker, from `watch` to `forget` or `close`."""

    def __init__(
        self, registry: Registry, rhythm: Rhythm, headers: tuple[Header, ...], restarted: Callable[[Worker], None]
    ) -> None:
        """`restarted` is told of workers that are another instance than before."""
        self._registry = registry
        self._restarted = restarted
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
        record, loop = Record(self._rhythm.failures), asyncio.get_running_loop()
        nudge = self._nudges[worker]
        while True:
            suspect = nudge.is_set()
            nudge.clear()
            asked = loop.time()
            problem = await self._problem(worker, learn=suspect or not worker.healthy)
            if problem is None:
                record.good()
                if not worker.healthy:
                    log.info("%s worker %s is up", worker.role, worker.url)
                self._registry.up(worker, loop.time())
            else:
                record.bad(problem, asked)
                self._doubt(worker, record, problem.reason)
            worker.pool.reap()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(self._rhythm.interval, RECHECK) if problem else self._rhythm.interval):
                    await nudge.wait()

    def _doubt(self, worker: Worker, record: Record, reason: str) -> None:
        if worker.healthy and record.failures >= self._rhythm.failures:
            log.warning("%s worker %s is down: %s", worker.role, worker.url, reason)
        if not worker.healthy or record.failures >= self._rhythm.failures:
            self._registry.down(worker, reason, asyncio.get_running_loop().time())
        if record.hangs(worker.pool.heard):
            worker.pool.break_off(f"it hangs: {reason}, nor anything else")

    async def _problem(self, worker: Worker, *, learn: bool) -> Problem | None:
        """Why the worker cannot be used, None if it can."""
        try:
            reply = await fetch(
                worker.pool, "GET", "/health", headers=self._headers, timeout=self._rhythm.timeout, limit=1 << 20
            )
            if not reply.ok:
                return Problem(f"/health answered {reply.status}")
            return await self._learn(worker) if learn else None
        except FetchFailed as error:
            return Problem(str(error), silent=isinstance(error, Silence))

    async def _learn(self, worker: Worker) -> Problem | None:
        info = await self._info(worker)
        said = info.get("disaggregation_mode")
        if said in ("prefill", "decode") and worker.role != said:
            return Problem(f"registered as {worker.role} worker, but says of itself that it is a {said} worker")
        port, model = info.get("disaggregation_bootstrap_port"), info.get("served_model_name") or info.get("model_path")
        facts = Facts(
            runtime=_runtime(info) if info else await self._foreign(worker),
            instance=str(info.get("instance") or ""),
            model=str(model or ""),
            bootstrap_port=port if isinstance(port, int) else None,
        )
        if self._registry.learned(worker, facts):
            log.info("%s worker %s was restarted", worker.role, worker.url)
            self._restarted(worker)
        return None

    async def _foreign(self, worker: Worker) -> Runtime:
        """vLLM's servers have no `/server_info`, but say their version."""
        reply = await fetch(worker.pool, "GET", "/version", headers=self._headers, timeout=self._rhythm.timeout)
        return "vllm" if reply.ok and b'"version"' in reply.body else "sglang"

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


def _runtime(info: dict[str, Any]) -> Runtime:
    if "vllm_config" in info:  # vLLM has this route in its development mode only
        return "vllm"
    return "baton" if "instance" in info else "sglang"
