"""What a request costs in the gateway: CPU and requests/s before two mock workers, with the Rust routers beside it.

    python benchmarks/router.py [--peers VENV] [--seconds 4] [--rounds 2] [--only baton]

One router after the other, in rounds, in four cases: a short prompt answered whole, a prompt of 2,000 words answered
whole, a stream of 32 chunks that come at once, a stream of 32 chunks 5 ms apart. First a closed loop over 16
connections: requests per second, and CPU (user + system) of the router's processes per request. Then the same load for
all, a fixed share of what the slowest of them could do, in an open loop: p50 and p99. `--peers` is a virtual
environment with sglang-router and vllm-router. Prints a table and, last, one JSON line with the ratios to the better
peer.
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
from statistics import median
from typing import cast

import httptools
import psutil
import uvloop
from http_load import closed, open_loop

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


CASES = (
    Case("short", 10, False),
    Case("long", 2000, False),
    Case("stream", 10, True),
    Case("paced", 10, True, 5.0),
)
SHARE = 0.4
"""Of what the slowest router can do, for the load that is the same for all."""


@dataclass
class Row:
    router: str
    case: str
    requests_per_second: float = 0.0
    cpu_us_per_request: float = 0.0
    rate: float = 0.0
    """Requests per second of the open loop."""
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    errors: int = 0


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


def cpu_seconds(process: psutil.Process) -> float:
    total = 0.0
    for one in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = one.cpu_times()
            total += times.user + times.system
    return total


def saturate(router: str, process: psutil.Process, port: int, case: Case, seconds: float) -> Row:
    """As much as it can do."""
    request = case.request(port)
    uvloop.run(closed(port, request, CONNECTIONS, min(1.0, seconds)))
    before, started = cpu_seconds(process), time.perf_counter()
    result = uvloop.run(closed(port, request, CONNECTIONS, seconds))
    wall, cpu = time.perf_counter() - started, cpu_seconds(process) - before
    count = max(1, len(result.times))
    row = Row(router, case.name)
    row.requests_per_second, row.cpu_us_per_request = round(count / wall, 1), round(cpu / count * 1e6, 1)
    row.errors = result.errors
    return row


def serve_at(row: Row, port: int, case: Case, rate: float, seconds: float, seed: int) -> None:
    """What its users see at a load that is the same for all."""
    result = uvloop.run(open_loop(port, case.request(port), rate, seconds, seed))
    row.rate, row.p50_ms, row.p99_ms = round(rate, 1), result.quantile(0.5), result.quantile(0.99)
    row.errors += result.errors


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


@contextlib.contextmanager
def workers(interval_ms: float) -> Iterator[tuple[int, int]]:
    """Ports of a prefill and a decode worker."""
    get = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
    me = [sys.executable, __file__, "--interval-ms", str(interval_ms), "--mock"]
    prefill, decode = free_port(), free_port()
    with running([*me, str(prefill)], prefill, get), running([*me, str(decode)], decode, get):
        yield prefill, decode


def round_of(case: Case, options: argparse.Namespace, rates: dict[str, float], seed: int) -> list[Row]:
    """All routers in one case, one after the other: first what they can do, then all at the same load."""
    rows, port = [], free_port()
    with workers(case.interval_ms) as (prefill, decode):
        found = commands(options.peers, port, prefill, decode)
        chosen = {name: command for name, command in found.items() if options.only in (None, name)}
        for name, command in chosen.items():
            with running(command, port, CASES[0].request(port)) as process:
                rows.append(saturate(name, process, port, case, options.seconds))
        rate = rates.setdefault(case.name, SHARE * min(row.requests_per_second for row in rows))
        for row, command in zip(rows, chosen.values(), strict=True):
            with running(command, port, CASES[0].request(port)):
                serve_at(row, port, case, rate, options.seconds, seed)
    return rows


def summary(rows: list[Row]) -> list[Row]:
    """The median of the rounds, column by column."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.case, row.router), []).append(row)
    merged = []
    for (case, router), group in groups.items():
        row = Row(router, case, errors=sum(one.errors for one in group))
        for name in ("requests_per_second", "cpu_us_per_request", "rate", "p50_ms", "p99_ms"):
            setattr(row, name, median(getattr(one, name) for one in group))
        merged.append(row)
    return merged


def ratios(rows: list[Row]) -> dict[str, dict[str, float]]:
    """Ours to the better of the peers, by case: below 1 is cheaper, or sooner."""
    found = {}
    for ours in (row for row in rows if row.router == "baton"):
        peers = [row for row in rows if row.case == ours.case and row.router != "baton"]
        if peers:
            found[ours.case] = {
                name: round(getattr(ours, name) / max(1e-9, min(getattr(peer, name) for peer in peers)), 2)
                for name in ("cpu_us_per_request", "p50_ms", "p99_ms")
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="virtual environment with sglang-router and vllm-router")
    parser.add_argument("--seconds", type=float, default=4.0, help="of load per router and case")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", help="one router")
    parser.add_argument("--case", help="one case: short, long, stream, paced")
    parser.add_argument("--mock", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--interval-ms", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.mock:
        uvloop.run(mock(options.mock, options.interval_ms / 1e3))
        return
    rows, rates = [], dict[str, float]()
    for seed in range(options.rounds):
        for case in CASES:
            if options.case in (None, case.name):
                rows += round_of(case, options, rates, seed)
    rows = summary(rows)
    for row in rows:
        print(
            f"{row.case:7} {row.router:14} {row.cpu_us_per_request:7.1f} us CPU/request  "
            f"{row.requests_per_second:7.0f} req/s   at {row.rate:6.0f} req/s: p50 {row.p50_ms:6.2f} ms  "
            f"p99 {row.p99_ms:7.2f} ms  {row.errors} errors"
        )
    conditions = {"connections": CONNECTIONS, "chunks": CHUNKS, "cores": os.cpu_count(), "rounds": options.rounds}
    report = {"benchmark": "router", "conditions": conditions, "ratios": ratios(rows)}
    print(json.dumps({**report, "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
