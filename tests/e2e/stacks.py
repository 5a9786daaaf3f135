"""The whole thing as a user starts it: `baton serve` in a process of its own, stopped and looked after."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

START_PATIENCE = 120.0
STOP_PATIENCE = 20.0


@dataclass(slots=True)
class Stack:
    process: subprocess.Popen[bytes]
    url: str
    log: Path

    @property
    def processes(self) -> list[psutil.Process]:
        """The supervisor's whole family, itself excluded."""
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def workers(self) -> list[dict[str, object]]:
        return list(httpx.get(f"{self.url}/workers", timeout=5).json()["workers"])

    def wait_ready(self, patience: float = START_PATIENCE) -> None:
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"baton serve ended early:\n{self.log.read_text()[-4000:]}"
            try:
                if httpx.get(f"{self.url}/readiness", timeout=2).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise AssertionError(f"not ready in {patience} s:\n{self.log.read_text()[-4000:]}")

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stop it and prove that nothing is left: no process, no socket file, no shared memory."""
        family = self.processes
        if self.process.poll() is None:
            self.process.send_signal(how)
        self.process.wait(STOP_PATIENCE)
        _, alive = psutil.wait_procs(family, timeout=STOP_PATIENCE)
        assert not alive, f"left behind: {alive}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serve(model: Path | str, backend: str, directory: Path, *flags: str) -> Iterator[Stack]:
    port = free_port()
    log = directory / f"serve-{port}.log"
    # Ports of its own: two test runs on one machine do not get into each other's way.
    ports = (
        "--port",
        str(port),
        "--worker-port",
        str(free_port()),
        "--disaggregation-bootstrap-port",
        str(free_port()),
    )
    command = [sys.executable, "-m", "baton", "serve", str(model), "--backend", backend, *ports, *flags]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    stack = Stack(process, f"http://127.0.0.1:{port}", log)
    try:
        stack.wait_ready()
        yield stack
    finally:
        try:
            stack.stop()
        finally:
            if process.poll() is None:
                process.kill()
        assert not list(Path("/dev/shm").glob("*baton*"))
