"""Two prefill and two decode workers as `baton serve` keeps them, a proxy before each, and gateways before these."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx
import psutil

from tests.chaos.proxy import Proxy
from tests.e2e.stacks import SMALL, START_PATIENCE, STOP_PATIENCE, Stack, client, free_port, held_in

BACKEND = "native(P:d2t1p1|D:d2t1p1)"
FIRST_PORTS, LAST_PORTS = 12_000, 32_000
"""Below those that the system gives to whoever connects: a worker that is started again needs its own again."""
QUICK = (
    *("--split", "always", "--retries", "6"),
    *("--stage-timeout", "2", "--stall-timeout", "2", "--worker-wait", "30", "--request-timeout", "60"),
    *("--health-interval", "0.3", "--health-timeout", "1", "--connect-timeout", "1"),
)
"""What hangs is found in a second or two."""
Role = Literal["prefill", "decode"]
Part = Literal["front", "engine"]
PATIENCE = 120.0
"""Restarted engines share two busy cores."""
POLL = 0.02


Behind = Sequence[tuple[str, str, int | None]]
"""Workers: (role, url, bootstrap port)."""


def flags() -> tuple[str, ...]:
    """Of `baton serve`."""
    ports = random.SystemRandom().sample(range(FIRST_PORTS, LAST_PORTS, 8), 2)
    return (
        *(*SMALL, "--kv-pages", "1024", "--meet-timeout", "3", "--move-timeout", "3"),
        *("--worker-port", str(ports[0]), "--disaggregation-bootstrap-port", str(ports[1])),
    )


class Gateway:
    """`baton gateway` in a process of its own."""

    def __init__(self, workers: Behind, log: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = log
        self._command = self.command(workers)
        self._process: subprocess.Popen[bytes] | None = None

    def command(self, workers: Behind) -> list[str]:
        line = [sys.executable, "-m", "baton", "gateway", "--port", str(self.port), *QUICK]
        for role, url, room in workers:
            line += [f"--{role}", url, *([str(room)] if role == "prefill" else [])]
        return line

    def start(self) -> None:
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(self._command, stdout=output, stderr=subprocess.STDOUT)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """As an operator does."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.terminate()
        try:
            self._process.wait(STOP_PATIENCE)
        finally:
            self._process.kill()
            self._process.wait()

    async def ready(self, workers: int) -> None:
        """Until all of them are usable."""

        def all_there() -> bool:
            assert self._process is not None
            assert self._process.poll() is None, self.words()
            return [worker["is_healthy"] for worker in self.workers()] == [True] * workers

        await until(all_there, "the gateway's workers", START_PATIENCE)

    def words(self) -> str:
        return self._log.read_text()[-4000:]

    def workers(self) -> list[dict[str, Any]]:
        try:
            with client(self.url, 5) as http:
                return list(http.get("/workers").json()["workers"])
        except httpx.TransportError:
            return []

    def held(self) -> list[str]:
        """Requests and loads that somebody still has."""
        with client(self.url, 5) as http:
            text = http.get("/metrics").text
        return [*held_in(text), *(f"load {w['load']} of {w['url']}" for w in self.workers() if w["load"])]

    def metric(self, name: str) -> float:
        with client(self.url, 5) as http:
            lines = http.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))

    @property
    def lives(self) -> bool:
        return self._process is not None and self._process.poll() is None


@dataclass(slots=True)
class Stage:
    stack: Stack
    random: random.Random
    proxies: dict[str, Proxy] = field(default_factory=dict)
    """By name: `prefill-0`."""
    gateways: list[Gateway] = field(default_factory=list)

    @property
    def url(self) -> str:
        return self.gateways[0].url

    def names(self, *roles: Role) -> list[str]:
        return [name for name in self.proxies if name.startswith(roles)]

    def process(self, name: str, part: Part) -> psutil.Process | None:
        """A worker's process, None while it has none."""
        if part == "front":
            found = [p for p in self.stack.processes if f"{name}.front" in _command(p)]
            return found[0] if found else None
        try:
            with client(self._worker_url(name), 5) as http:
                pid = http.get("/server_info").json().get("engine_pid")
            return psutil.Process(int(pid)) if pid else None
        except (httpx.TransportError, psutil.NoSuchProcess, ValueError):
            return None

    async def signal(self, name: str, part: Part, number: signal.Signals) -> psutil.Process:
        """As soon as there is such a process."""
        deadline = time.monotonic() + PATIENCE
        while True:
            process = await asyncio.to_thread(self.process, name, part)
            if process is not None:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)
                    return process
            assert time.monotonic() < deadline, f"{name} has no {part}"
            await asyncio.sleep(POLL)

    async def whole(self) -> None:
        """All workers live, and the gateway knows it."""
        for gateway in self.gateways:
            if gateway.lives:
                await gateway.ready(len(self.proxies))

    async def settled(self) -> None:
        """Nobody holds a request, a hand-off, a load or a page."""
        await self.whole()
        await until(lambda: not self.held(), "nothing is held", PATIENCE, self.held)

    def held(self) -> list[str]:
        try:
            alive = [gateway for gateway in self.gateways if gateway.lives]
            return [*self.stack.held(), *(what for gateway in alive for what in gateway.held())]
        except httpx.TransportError as error:
            return [f"no word: {error!r}"]

    def _worker_url(self, name: str) -> str:
        host, port = self.proxies[name].target
        return f"http://{host}:{port}"


@contextlib.asynccontextmanager
async def staged(
    stack: Stack, directory: Path, seed: int, gateways: Sequence[type[Gateway]] = (Gateway,)
) -> AsyncIterator[Stage]:
    stage = Stage(stack, random.Random(seed))
    async with contextlib.AsyncExitStack() as open_things:
        behind: list[tuple[str, str, int | None]] = []
        counts = {"prefill": 0, "decode": 0}
        for worker in sorted(stack.workers(), key=lambda worker: str(worker["url"])):
            role, place = str(worker["worker_type"]), urlsplit(str(worker["url"]))
            name = f"{role}-{counts[role]}"
            counts[role] += 1
            assert place.hostname is not None
            assert place.port is not None
            proxy = await open_things.enter_async_context(Proxy(place.hostname, place.port, seed + len(behind)))
            stage.proxies[name] = proxy
            room = worker["bootstrap_port"]
            behind.append((role, proxy.url, room if isinstance(room, int) else None))
        for index, kind in enumerate(gateways):
            gateway = kind(behind, directory / f"gateway-{seed}-{index}.log")
            open_things.callback(gateway.stop)
            gateway.start()
            stage.gateways.append(gateway)
        await stage.whole()
        yield stage
        for proxy in stage.proxies.values():
            proxy.choose = lambda: None
            proxy.join()
        await stage.settled()


async def until(
    condition: Callable[[], bool], what: str, patience: float, detail: Callable[[], object] = lambda: ""
) -> None:
    """Conditions ask over HTTP, so they are asked in a thread: the proxies live in this loop."""
    deadline = time.monotonic() + patience
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < deadline, f"not in {patience:g} s: {what} {detail()}"
        await asyncio.sleep(POLL)


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""
