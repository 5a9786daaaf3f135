"""A gateway between an HTTP client and two mock workers, all in one loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import httpx

from baton.base.config import GatewayConfig
from baton.gateway.app import Gateway
from baton.gateway.process import serving
from tests.router.mocks import Behaviour, Exchange, Mock, run, until, whole

CHAT = "/v1/chat/completions"
RECEIPT = whole({"choices": [{"index": 0, "finish_reason": "length"}]})


@dataclass
class Stack:
    gateway: Gateway
    client: httpx.AsyncClient
    prefill: Mock
    decode: Mock
    url: str

    async def post(self, path: str = CHAT, **kwargs: Any) -> httpx.Response:
        if "content" not in kwargs:
            kwargs.setdefault("json", {"messages": []})
        return await self.client.post(path, **kwargs)

    async def settled(self) -> None:
        """Nothing is in flight any more, and every token is given back."""
        workers = self.gateway.router.registry.workers
        await until(lambda: all(w.in_flight == 0 for w in workers))
        assert all(w.load == 0 for w in workers)
        await until(lambda: all(w.pool.open_connections == w.pool.idle_connections for w in workers))
        await until(lambda: self.gateway.metrics.in_flight == 0)


@contextlib.asynccontextmanager
async def stack(
    prefill: Behaviour, decode: Behaviour, *, regular: list[Mock] | None = None, ready: bool = True, **options: Any
) -> AsyncIterator[Stack]:
    usual = {"request_timeout": 10.0, "health_interval": 0.2, "worker_wait": 0.0}
    config = GatewayConfig(port=0, drain_timeout=1.0, **{**usual, **options})
    async with (
        Mock(prefill) as p,
        Mock(decode) as d,
        serving(config, [(p.url, 8998)], [d.url], [m.url for m in regular or []]) as (gateway, _, port),
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=15) as client,
    ):
        if ready:
            await until(lambda: all(w.healthy for w in gateway.router.registry.workers))
        yield Stack(gateway, client, p, d, f"http://127.0.0.1:{port}")


def with_stack(
    prefill: Behaviour, decode: Behaviour, check: Callable[[Stack], Awaitable[None]], **options: Any
) -> None:
    """Run `check`; afterwards nothing may be in flight."""

    async def main() -> None:
        async with stack(prefill, decode, **options) as one:
            await check(one)
            await one.settled()

    run(main())


def meeting(prefill_says: Any, decode_answers: Behaviour) -> tuple[Behaviour, Behaviour]:
    """A pair that meets: D answers only after P has been asked in the same room, P replies when D is there."""
    rooms: dict[Any, tuple[asyncio.Event, asyncio.Event]] = {}

    def events_of(exchange: Exchange) -> tuple[asyncio.Event, asyncio.Event]:
        return rooms.setdefault(str(exchange.json["bootstrap_room"]), (asyncio.Event(), asyncio.Event()))

    async def prefill(exchange: Exchange) -> None:
        here, there = events_of(exchange)
        here.set()
        await there.wait()
        exchange.whole(prefill_says)

    async def decode(exchange: Exchange) -> None:
        there, here = events_of(exchange)
        here.set()
        await there.wait()
        await decode_answers(exchange)

    return prefill, decode
