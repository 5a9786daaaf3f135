"""What the load generator itself costs: CPU per streamed token, ours against httpx reading the same streams.

    python benchmarks/generator.py [--quick]

The server is a process of its own that writes a ready-made event every 2 ms to each of 8 streams. Prints a table
and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import time
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection

import httpx
import uvloop

from baton.lab.bench import measure
from baton.lab.config import BenchConfig
from baton.lab.report import Conditions, rounded

EVENT = (
    b'data: {"id":"cmpl-1","object":"text_completion","created":1,"model":"mock",'
    b'"choices":[{"index":0,"text":" word","logprobs":null,"finish_reason":null}]}\n\n'
)
GAP = 0.002
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            size = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            tokens = json.loads(await reader.readexactly(size))["max_tokens"]
            writer.write(HEAD)
            for _ in range(tokens):
                writer.write(b"%x\r\n%s\r\n" % (len(EVENT), EVENT))
                await asyncio.sleep(GAP)  # the reader sees them one by one, as with a real server
            writer.write(b"%x\r\n%s\r\n0\r\n\r\n" % (14, b"data: [DONE]\n\n"))
    except asyncio.IncompleteReadError:
        writer.close()


def serve(ready: Connection) -> None:
    async def main() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        ready.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    uvloop.run(main())


async def ours(url: str, streams: int, tokens: int) -> float:
    config = BenchConfig(
        url=url, model="mock", requests=streams, concurrency=8, input_len="8", output_len=str(tokens), warmup=1
    )
    return (await measure(config)).client_cpu


async def with_httpx(url: str, streams: int, tokens: int) -> float:
    gaps: list[float] = []
    cap = asyncio.Semaphore(8)

    async def one(client: httpx.AsyncClient) -> None:
        body = {"model": "mock", "prompt": [1] * 8, "max_tokens": tokens, "stream": True}
        async with cap, client.stream("POST", "/v1/completions", json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    gaps.append(time.monotonic())
                    assert json.loads(line[6:])["choices"][0]["text"]

    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        await one(client)
        start = time.process_time()
        await asyncio.gather(*(one(client) for _ in range(streams)))
        return time.process_time() - start


Way = Callable[[str, int, int], Awaitable[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer tokens: a check that it works")
    args = parser.parse_args()
    streams, tokens, repeats = (8, 100, 1) if args.quick else (16, 500, 3)
    here, there = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(there,), daemon=True)
    server.start()
    try:
        if not here.poll(30):
            raise SystemExit("the mock server did not start within 30 s")
        url = f"http://127.0.0.1:{here.recv()}"
        ways: dict[str, tuple[Callable[..., float], Way]] = {
            "baton bench (uvloop)": (uvloop.run, ours),
            "baton bench (asyncio)": (asyncio.run, ours),
            "httpx (uvloop)": (uvloop.run, with_httpx),
            "httpx (asyncio)": (asyncio.run, with_httpx),
        }
        best = dict.fromkeys(ways, float("inf"))
        for _ in range(repeats):
            for name, (runner, way) in ways.items():
                cpu = runner(way(url, streams, tokens))
                best[name] = min(best[name], cpu * 1e6 / (streams * tokens))
    finally:
        server.terminate()
        server.join(10)
    for name, cost in best.items():
        print(f"{name:24} {cost:8.1f} us of CPU per token")
    print(json.dumps(rounded({"bench": "generator", "us_per_token": best, "conditions": vars_of(Conditions.here())})))


def vars_of(conditions: Conditions) -> dict[str, object]:
    return {name: getattr(conditions, name) for name in conditions.__slots__}


if __name__ == "__main__":
    main()
