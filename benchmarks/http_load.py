"""Raw HTTP/1.1 load on one address, with as little work per request as Python allows.

`closed`: every connection asks again as soon as it has been answered, which shows what something can do.
`open_loop`: requests leave at times fixed beforehand, and latency counts from then, whether or not a connection was
free: which shows what users see (a slow answer delays nobody's question).
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from random import Random
from typing import cast

import httptools


@dataclass
class Result:
    times: list[float] = field(default_factory=list)
    """Seconds, of those that were answered with 200."""
    errors: int = 0

    def quantile(self, q: float) -> float:
        """Milliseconds."""
        times = sorted(self.times)
        return round(times[int(len(times) * q)] * 1e3, 2) if times else 0.0


class Client(asyncio.Protocol):
    """One connection; `ask` again when `free`."""

    def __init__(self, result: Result) -> None:
        self.result = result
        self.free = asyncio.Event()
        self.lost = False
        self.asked = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.parser = httptools.HttpResponseParser(self)

    def ask(self, request: bytes, since: float) -> None:
        self.free.clear()
        self.asked = since
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_message_complete(self) -> None:
        if self.parser.get_status_code() == 200:
            self.result.times.append(time.perf_counter() - self.asked)
        else:
            self.result.errors += 1
        self.free.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        if not self.free.is_set():
            self.result.errors += 1
            self.free.set()


async def connect(port: int, result: Result) -> Client:
    _, client = await asyncio.get_running_loop().create_connection(lambda: Client(result), "127.0.0.1", port)
    return client


async def closed(port: int, request: bytes, connections: int, seconds: float) -> Result:
    result, until = Result(), time.perf_counter() + seconds

    async def one() -> None:
        client = await connect(port, result)
        while time.perf_counter() < until and not client.lost:
            client.ask(request, time.perf_counter())
            await client.free.wait()
        client.transport.close()

    await asyncio.gather(*(one() for _ in range(connections)))
    return result


async def open_loop(port: int, request: bytes, rate: float, seconds: float, seed: int) -> Result:
    """`rate` requests a second on average, with the gaps of a Poisson process."""
    result, random, idle = Result(), Random(seed), list[Client]()
    asking: set[asyncio.Task[None]] = set()
    due = time.perf_counter()
    until = due + seconds

    async def one(since: float) -> None:
        client = idle.pop() if idle else await connect(port, result)
        client.ask(request, since)
        await client.free.wait()
        if not client.lost:
            idle.append(client)

    while due < until:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        task = asyncio.ensure_future(one(due))
        asking.add(task)
        task.add_done_callback(asking.discard)
        due += random.expovariate(rate)
    await asyncio.gather(*asking)
    for client in idle:
        client.transport.close()
    return result
