"""Servers for benchmarks: started as processes of their own session, awaited with a bound, stopped by their ids."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

BATON = (sys.executable, "-c", "from baton.cli import main; main()")
STOP_SECONDS = 30.0


class NotReady(RuntimeError):
    """A server ended, or did not answer in time."""


@dataclass
class Server:
    """A process (with its children) that answers at `url`. `stop` is its only release."""

    name: str
    url: str
    process: subprocess.Popen[bytes]
    log: Path
    ready_path: str = "/health"
    _at_ready: float = field(default=0.0, repr=False)

    def ready(self) -> bool:
        """Raises `NotReady` if the process has ended."""
        if self.process.poll() is not None:
            raise NotReady(f"{self.name} ended with {self.process.returncode} before it was ready:\n{self.tail()}")
        try:
            with urllib.request.urlopen(self.url + self.ready_path, timeout=2) as reply:
                return bool(reply.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def tail(self, lines: int = 25) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def cpu_seconds(self) -> float:
        """CPU that the process and its living descendants have used."""
        total = 0.0
        with contextlib.suppress(psutil.NoSuchProcess):
            main = psutil.Process(self.process.pid)
            for process in [main, *main.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    times = process.cpu_times()
                    total += times.user + times.system
        return total

    def stop(self) -> None:
        """Ask the leader; whoever of its session is left after that is killed."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Fleet:
    """The servers of one benchmark; a context manager that stops all of them, also after Ctrl-C or an error."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        logs.mkdir(parents=True, exist_ok=True)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Fleet:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def launch(
        self,
        name: str,
        command: Sequence[str],
        port: int,
        *,
        env: Mapping[str, str] | None = None,
        cores: Sequence[int] = (),
        ready_path: str = "/health",
    ) -> Server:
        """Start it, wait for nothing. `cores` binds it (and what it starts) to these."""
        if cores:
            command = ["taskset", "-c", ",".join(map(str, cores)), *command]
        log = self.logs / f"{name.replace(' ', '-')}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                start_new_session=True,
            )
        server = Server(name, f"http://127.0.0.1:{port}", process, log, ready_path)
        self._stack.callback(server.stop)
        return server

    def wait(self, servers: Sequence[Server], within: float) -> None:
        """Until all answer. Raises `NotReady` with the end of the log of the one that does not."""
        begun = time.monotonic()
        waiting = list(servers)
        while waiting:
            waiting = [server for server in waiting if not server.ready()]
            if waiting and time.monotonic() - begun > within:
                raise NotReady(f"{waiting[0].name} did not answer within {within:.0f} s:\n{waiting[0].tail()}")
            time.sleep(0.25)
        names = ", ".join(server.name for server in servers)
        note(f"{names}: ready after {time.monotonic() - begun:.0f} s")

    def baton_serve(self, name: str, model: str, backend: str, *options: str) -> Server:
        """`baton serve`: workers and gateway."""
        port = free_port()
        command = [*BATON, "serve", model, "--backend", backend, "--port", str(port), *options]
        return self.launch(name, command, port, ready_path="/readiness")

    def baton_worker(self, name: str, model: str, *options: str, cores: Sequence[int] = ()) -> Server:
        """One undivided worker without a gateway."""
        port = free_port()
        command = [*BATON, "worker", "--model-path", model, "--port", str(port), *options]
        return self.launch(name, command, port, cores=cores, ready_path="/ready")


def free_port() -> int:
    """One that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def idle_cores(servers: Sequence[Server], seconds: float = 3.0) -> dict[str, float]:
    """CPU that servers use while nobody asks them anything, in cores: what they take from the one under test."""
    before = [server.cpu_seconds() for server in servers]
    time.sleep(seconds)
    return {s.name: (s.cpu_seconds() - b) / seconds for s, b in zip(servers, before, strict=True)}


def greedy_text(url: str, tokens: Sequence[int], count: int, within: float = 120.0) -> str:
    """One greedy answer, to see that two ways of serving say the same words."""
    with urllib.request.urlopen(f"{url}/v1/models", timeout=10) as reply:
        model = json.load(reply)["data"][0]["id"]
    body: dict[str, Any] = {"model": model, "prompt": list(tokens), "max_tokens": count, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body | {"ignore_eos": True}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=within) as reply:
        return str(json.load(reply)["choices"][0]["text"])


def note(text: str) -> None:
    """Progress goes to stderr; stdout is for results."""
    print(text, file=sys.stderr, flush=True)
