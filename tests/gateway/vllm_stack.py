"""A gateway before vLLM pairs that err as the real ones do (`tests/router/vllm.py`), all in one loop."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, cast

import httpx

from baton.base.config import GatewayConfig
from baton.gateway.app import Gateway
from baton.gateway.process import serving
from baton.router.registry import Connector, Description
from tests.router.mocks import Mock, run, until
from tests.router.vllm import (
    Decode,
    Ledger,
    Prefill,
    Server,
    answer_to,
)

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PROMPT = "the quick brown fox"


@dataclass
class Pairs:
    gateway: Gateway
    client: httpx.AsyncClient
    ledger: Ledger
    prefill: list[Prefill]
    decode: list[Decode]
    bootstrap: list[Mock] = field(default_factory=list)

    @property
    def p(self) -> Prefill:
        return self.prefill[0]

    @property
    def d(self) -> Decode:
        return self.decode[0]

    async def ask(self, prompt: Any = PROMPT, path: str = COMPLETIONS, **more: Any) -> httpx.Response:
        return await self.client.post(path, json={"prompt": prompt, **more})

    async def served(self, prompt: Any = PROMPT, **more: Any) -> None:
        """It is answered, rightly."""
        reply = await self.ask(prompt, **more)
        assert reply.status_code == 200, reply.text
        assert said(reply) == answer_to(json.dumps(prompt))

    def worker(self, server: Server) -> Any:
        return self.gateway.router.registry.by_url(server.url)

    async def settled(self) -> None:
        workers = self.gateway.router.registry.workers
        await until(lambda: all(w.in_flight == 0 for w in workers))
        assert all(w.load == 0 for w in workers)
        await until(lambda: all(w.pool.open_connections == w.pool.idle_connections for w in workers))


def said(reply: httpx.Response) -> str:
    if reply.headers["content-type"].startswith("text/event-stream"):
        assert reply.text.endswith("data: [DONE]\n\n")
        return str(json.loads(reply.text.split("\n")[0][6:])["choices"][0]["text"])
    return str(reply.json()["choices"][0]["text"])


def leave(asking: asyncio.Task[httpx.Response] | None) -> None:
    if asking is not None:
        asking.cancel()


@contextlib.asynccontextmanager
async def pairs(connector: str = "nixl", count: tuple[int, int] = (1, 1), **options: Any) -> AsyncIterator[Pairs]:
    usual = {"request_timeout": 10.0, "health_interval": 0.1, "worker_wait": 2.0, "split": "always", "port": 0}
    config = GatewayConfig(drain_timeout=1.0, **{**usual, **options})
    ledger = Ledger()
    async with contextlib.AsyncExitStack() as stack:
        kind = connector.removesuffix("-auto")
        prefill = [Prefill(ledger, kind) for _ in range(count[0])]
        decode = [Decode(ledger, kind) for _ in range(count[1])]
        for server in (*prefill, *decode):
            await stack.enter_async_context(server)
        bootstrap = [await stack.enter_async_context(Mock(p.query)) for p in prefill] if kind == "mooncake" else []
        gateway, _, port = await stack.enter_async_context(serving(config))
        client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=15)
        await stack.enter_async_context(client)
        for index, p in enumerate(prefill):
            here = bootstrap[index].port if bootstrap else None
            gateway.router.add(p.url, Description("prefill", here, connector=cast(Connector, connector)))
        for d in decode:
            d.peer = lambda: prefill[0]
            gateway.router.add(d.url, Description("decode", connector=cast(Connector, connector)))
        await until(lambda: all(w.healthy for w in gateway.router.registry.workers))
        yield Pairs(gateway, client, ledger, prefill, decode, bootstrap)


def with_pairs(
    check: Callable[[Pairs], Awaitable[None]], connector: str = "nixl", *, left: int = 0, **options: Any
) -> None:
    """Run `check`; afterwards nothing is in flight, no server was ended, nobody got wrong text, and `left` sets of
    blocks wait for a lease to run out."""

    async def main() -> None:
        async with pairs(connector, **options) as one:
            await check(one)
            await one.settled()
            assert one.ledger.dead == []
            assert one.ledger.wrong == 0
            assert len(one.ledger.held) == left, one.ledger.held

    run(main())
