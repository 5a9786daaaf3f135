"""What a request costs in the gateway: CPU and requests/s before two mock workers, with the Rust routers beside it.

    python benchmarks/router.py [--peers VENV] [--seconds 4] [--only baton]

Closed loop over 16 connections, one router after the other, in three cases: a short prompt answered whole, a prompt of
2,000 words answered whole, a stream of 32 chunks. CPU is that of the router's processes (user + system), divided by the
requests that were answered meanwhile. `--peers` is a virtual environment with sglang-router and vllm-router.
Prints a table and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import httptools
import psutil
import uvloop

CHUNKS = 32
CONNECTIONS = 16
PATH = "/v1/chat/completions"


@dataclass(frozen=True)
class Case:
    name: str
    words: int
    stream: bool
    interval_ms: float = 0.0

    def request(self, port: int) -> bytes:
        body = json.dumps(
            {
                "model": "mock",
                "stream": self.stream,
                "max_tokens": CHUNKS,
                "messages": [{"role": "user", "content": "hello " * self.words}],
            }
        ).encode()
        head = f"POST {PATH} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\n"
        return head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body


CASES = (Case("short", 10, False), Case("long", 2000, False), Case("stream", 10, True))


@dataclass(frozen=True)
class Row:
    router: str
    case: str
    requests_per_second: float
    p50_ms: float
    p99_ms: float
    cpu_us_per_request: float
    errors: int


# --- mock workers: as little work per request as Python allows


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


def _full(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


INFO = _full(
    _json({"model_path": "mock", "served_model_name": "mock", "tp_size": 1, "dp_size": 1, "version": "0",
           "is_generation": True, "max_total_num_tokens": 1 << 20, "internal_states": [{}], "model_type": "llama"})
)  # fmt: skip
MODELS = _full(_json({"object": "list", "data": [{"id": "mock", "object": "model", "created": 0, "owned_by": "x"}]}))
USAGE = {"prompt_tokens": 1, "completion_tokens": CHUNKS, "total_tokens": CHUNKS + 1}
MESSAGE = {"role": "assistant", "content": "hello " * CHUNKS}
ANSWER = _full(
    _json({"id": "x", "object": "chat.completion", "created": 0, "model": "mock", "usage": USAGE,
           "choices": [{"index": 0, "message": MESSAGE, "finish_reason": "stop"}]})
)  # fmt: skip
EVENT = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "mock"}
PIECE = _chunk(b"data: " + _json(EVENT | {"choices": [{"index": 0, "delta": {"content": "hello "}}]}) + b"\n\n")
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
STREAM_END = _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


class Mock(asyncio.Protocol):
    def __init__(self, interval: float) -> None:
        self.interval = interval

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.parser = httptools.HttpRequestParser(self)

    def data_received(self, data: bytes) -> None:
        with contextlib.suppress(httptools.HttpParserError, httptools.HttpParserUpgrade):
            self.parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self.url, self.body = url, b""

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        if self.url.startswith(b"/v1/models"):
            self.transport.write(MODELS)
        elif b"info" in self.url:
            self.transport.write(INFO)
        elif not self.url.startswith(b"/v1/"):
            self.transport.write(_full(b"{}"))
        elif b'"stream": true' not in self.body and b'"stream":true' not in self.body:
            self.transport.write(ANSWER)
        elif self.interval:
            self.transport.write(STREAM_HEAD)
            self.pieces(CHUNKS)
        else:
            self.transport.write(STREAM_HEAD)
            for _ in range(CHUNKS):
                self.transport.write(PIECE)
            self.transport.write(STREAM_END)

    def pieces(self, left: int) -> None:
        if left == 0:
            self.transport.write(STREAM_END)
            return
        self.transport.write(PIECE)
        asyncio.get_running_loop().call_later(self.interval, self.pieces, left - 1)


async def mock(port: int, interval: float) -> None:
    server = await asyncio.get_running_loop().create_server(lambda: Mock(interval), "127.0.0.1", port)
    await server.serve_forever()


# --- load


class Load(asyncio.Protocol):
    """One connection that asks again as soon as it has been answered."""

    def __init__(self, request: bytes, until: float, done: asyncio.Event) -> None:
        self.request, self.until, self.done = request, until, done
        self.times: list[float] = []
        self.errors = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.parser = httptools.HttpResponseParser(self)
        self.ask()

    def ask(self) -> None:
        self.asked = time.perf_counter()
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_message_complete(self) -> None:
        now = time.perf_counter()
        if self.parser.get_status_code() == 200:
            self.times.append(now - self.asked)
        else:
            self.errors += 1
        if now >= self.until:
            self.transport.close()
        else:
            self.ask()

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None:
            self.errors += 1
        self.done.set()


async def load(port: int, case: Case, seconds: float) -> tuple[list[float], int]:
    loop, request, until = asyncio.get_running_loop(), case.request(port), time.perf_counter() + seconds
    ends = [asyncio.Event() for _ in range(CONNECTIONS)]
    made = [await loop.create_connection(lambda end=end: Load(request, until, end), "127.0.0.1", port) for end in ends]
    for end in ends:
        await end.wait()
    loads = [protocol for _, protocol in made]
    return sorted(t for one in loads for t in one.times), sum(one.errors for one in loads)


def cpu_seconds(process: psutil.Process) -> float:
    total = 0.0
    for one in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = one.cpu_times()
            total += times.user + times.system
    return total


def measure(router: str, process: psutil.Process, port: int, case: Case, seconds: float) -> Row:
    uvloop.run(load(port, case, min(1.0, seconds)))
    before, started = cpu_seconds(process), time.perf_counter()
    times, errors = uvloop.run(load(port, case, seconds))
    wall, cpu = time.perf_counter() - started, cpu_seconds(process) - before
    count = max(1, len(times))
    p50, p99 = (round(times[int(len(times) * q)] * 1e3, 2) if times else 0.0 for q in (0.5, 0.99))
    return Row(
        router, case.name, round(count / wall, 1), round(p50, 2), round(p99, 2), round(cpu / count * 1e6, 1), errors
    )


# --- routers


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def commands(peers: Path | None, port: int, prefill: int, decode: int) -> dict[str, list[str]]:
    """Command line per router; only those that are installed."""
    ours = (
        "from baton.base.config import GatewayConfig; from baton.gateway.process import run; "
        f"run(GatewayConfig(port={port}, log_level='warning'), [('http://127.0.0.1:{prefill}', 8998)], "
        f"['http://127.0.0.1:{decode}'], [])"
    )
    found = {"baton": [sys.executable, "-c", ours]}
    if peers is None:
        return found
    common = [
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--policy",
        "round_robin",
        "--prometheus-port",
        str(free_port()),
    ]
    pair = ["--prefill", f"http://127.0.0.1:{prefill}", "--decode", f"http://127.0.0.1:{decode}"]
    python = str(peers / "bin" / "python")
    if list(peers.glob("lib/python*/site-packages/sglang_router")):
        found["sglang-router"] = [python, "-m", "sglang_router.launch_router", "--pd-disaggregation", *pair, *common]
    if list(peers.glob("lib/python*/site-packages/vllm_router")):
        found["vllm-router"] = [str(peers / "bin" / "vllm-router"), "--vllm-pd-disaggregation", *pair, *common]
    return found


@contextlib.contextmanager
def running(command: list[str], port: int, ready: bytes) -> Iterator[psutil.Process]:
    """The process, once it answers `ready` with 200; ended with its children at the end of the block."""
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while not answers(port, ready):
            if child.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"did not start: {' '.join(command)}")
            time.sleep(0.1)
        yield psutil.Process(child.pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)
        try:
            child.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def answers(port: int, request: bytes) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as one:
            one.sendall(request)
            return b" 200 " in one.recv(64)
    except OSError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="virtual environment with sglang-router and vllm-router")
    parser.add_argument("--seconds", type=float, default=4.0, help="of load per router and case")
    parser.add_argument("--only", help="one router")
    parser.add_argument("--interval-ms", type=float, default=0.0, help="between the chunks of a stream")
    parser.add_argument("--mock", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.mock:
        uvloop.run(mock(options.mock, options.interval_ms / 1e3))
        return
    me = [sys.executable, __file__, "--interval-ms", str(options.interval_ms), "--mock"]
    prefill, decode, port = free_port(), free_port(), free_port()
    get = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
    rows = []
    with running([*me, str(prefill)], prefill, get), running([*me, str(decode)], decode, get):
        for name, command in commands(options.peers, port, prefill, decode).items():
            if options.only in (None, name):
                with running(command, port, CASES[0].request(port)) as process:
                    rows += [measure(name, process, port, case, options.seconds) for case in CASES]
    for row in rows:
        print(
            f"{row.router:14} {row.case:7} {row.requests_per_second:8.0f} req/s  p50 {row.p50_ms:6.2f} ms  "
            f"p99 {row.p99_ms:7.2f} ms  {row.cpu_us_per_request:7.1f} us CPU/request  {row.errors} errors"
        )
    conditions = {
        "connections": CONNECTIONS,
        "chunks": CHUNKS,
        "interval_ms": options.interval_ms,
        "cores": os.cpu_count(),
    }
    print(json.dumps({"benchmark": "router", "conditions": conditions, "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
