"""The whole thing as a user starts it: `baton serve` in a process of its own, stopped and looked after."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

UNIFIED = "native:d1t1p1"
PD = "native(P:d1t1p1|D:d1t1p1)"
SMALL = ("--kv-pages", "256", "--max-model-len", "512", "--page-size", "8", "--chunked-prefill-size", "32")
"""Of pages, chunks and a pool that a few tiny requests fill."""
START_PATIENCE = 120.0
STOP_PATIENCE = 20.0
SETTLE_PATIENCE = 10.0
HELD = (
    "baton_gateway_in_flight",
    "baton_worker_in_flight",
    "baton_num_http_requests",
    "baton_num_requests_running",
    "baton_num_requests_waiting",
    "baton_num_handoffs_open",
)
"""Gauges of gateway and workers that are 0 when nobody asks for anything."""
HELD_PAGES = ("used", "quarantined")


def client(url: str, timeout: float = 60.0) -> httpx.Client:
    """Without certificates, which nothing here needs and which take longer to load than a tiny model to answer."""
    return httpx.Client(base_url=url, timeout=timeout, verify=False)


@dataclass(slots=True)
class Stack:
    process: subprocess.Popen[bytes]
    url: str
    log: Path
    family: set[int] = field(default_factory=set)
    """The processes' ids when it was ready."""

    @property
    def processes(self) -> list[psutil.Process]:
        """The supervisor's whole family, itself excluded."""
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def worker(self, role: str) -> str:
        """The URL of the (only) worker of that role."""
        return next(str(worker["url"]) for worker in self.workers() if worker["worker_type"] == role)

    def held(self) -> list[str]:
        """What somebody still holds: requests, sequences, hand-offs, KV pages."""
        with client(self.url, 5) as http:
            workers = [str(worker["url"]) for worker in http.get("/workers").json()["workers"]]
            texts = {url: http.get(f"{url}/metrics").text for url in (self.url, *workers)}
        return [f"{url}: {what}" for url, text in texts.items() for what in held_in(text)]

    def settle(self) -> None:
        """Soon nothing is held any more."""
        deadline = time.monotonic() + SETTLE_PATIENCE
        while held := self.held():
            assert time.monotonic() < deadline, f"held after {SETTLE_PATIENCE} s: {held}"
            time.sleep(0.02)

    def assert_clean(self) -> None:
        """Nothing is held, and nobody died on the way."""
        self.settle()
        assert {process.pid for process in self.processes} == self.family

    def generate(self, **body: object) -> Any:
        with client(self.url) as http:
            response = http.post("/generate", json=body)
        assert response.status_code == 200, response.text
        return response.json()

    def workers(self) -> list[dict[str, object]]:
        with client(self.url, 5) as http:
            return list(http.get("/workers").json()["workers"])

    def wait_ready(self, patience: float = START_PATIENCE) -> None:
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"baton serve ended early:\n{self.log.read_text()[-4000:]}"
            try:
                with client(self.url, 2) as http:
                    ready = http.get("/readiness")
                    if ready.status_code == 200 and ready.json()["healthy_workers"] == ready.json()["total_workers"]:
                        self.family = {process.pid for process in self.processes}
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


def held_in(text: str) -> list[str]:
    """In Prometheus' text."""
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return [
        f"{sample.name}{sample.labels.get('state', '')} {sample.value:g}"
        for sample in samples
        if sample.value
        and (sample.name in HELD or (sample.name == "baton_kv_pages" and sample.labels["state"] in HELD_PAGES))
    ]


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
    split = ("--split", "always")  # the prompts of tests are so short that they would go whole
    command = [sys.executable, "-m", "baton", "serve", str(model), "--backend", backend, *ports, *split, *flags]
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
