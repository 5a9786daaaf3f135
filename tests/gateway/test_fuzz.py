"""Bytes that are almost requests. Each connection is answered or closed soon, with nothing that would be our fault;
workers get what is well formed; afterwards all is as before. `BATON_FUZZ_EXAMPLES=10000` runs for longer."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass

import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from baton.base.config import GatewayConfig
from baton.gateway.app import Gateway
from baton.gateway.bounds import Bounds
from baton.gateway.listen import bind
from baton.gateway.process import workers
from baton.gateway.server import Server
from tests.gateway.tap import Tap
from tests.router.mocks import until

EXAMPLES = int(os.environ.get("BATON_FUZZ_EXAMPLES", "20"))
CONNECTIONS = 24
"""Of one example, at the same time."""
QUICK = Bounds(
    body=4096, head=2048, headers=20, keep_alive=0.03, head_seconds=0.03, body_seconds=0.03, linger=0.03, sweep=0.005
)
PATIENCE = 5.0
"""Seconds; ten times what the bounds above add up to, and some for a busy machine."""
STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")
OURS = frozenset({b"500", b"502", b"503", b"504"})
HOST = b"Host: localhost:8000\r\n"
CHAT = b'{"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}'
VALID = [
    b"POST /v1/chat/completions HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n\r\n" % len(CHAT) + CHAT,
    b"POST /v1/completions HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n"
    b'e;x=y\r\n{"prompt": "a"\r\n1\r\n}\r\n0\r\nX-Trailer: 1\r\n\r\n',
    b"POST /generate HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: 13\r\n\r\n" + b'{"text": "ab"}'[:13],
    b"POST /v1/embeddings?a=%20b HTTP/1.1\r\n" + HOST + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n{}",
    b"POST /v1/x HTTP/1.1\r\n" + HOST + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n"
    b"Content-Length: 2\r\n\r\n{}",
    b"HEAD /health HTTP/1.1\r\n" + HOST + b"X-Request-Id: abc\r\nAccept: */*\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n",
    b"GET /workers HTTP/1.1\r\n" + HOST + b"Connection: X-Y, keep-alive\r\nX-Y: z\r\n\r\n",
    b"GET http://h/readiness HTTP/1.1\r\n" + HOST + b"\r\n",
    b"OPTIONS /%76%31/x HTTP/1.1\r\n" + HOST + b"\r\n",
]
WORDS = [
    b"\r\n", b"\n", b"\r", b"\r\n\r\n", b"\0", b" ", b"\t", b":", b";", b",", b"%", b"%00", b"%2e%2e/", b"//",
    b"#", b"?", b"0\r\n\r\n", b"ffffffffffffffff", b"0x", b"-1", b"+1", b"HTTP/1.0", b"HTTP/2.0", b"GET / HTTP/1.1\r\n",
    b"CONNECT ", b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: identity\r\n",
    b"Connection: upgrade\r\nUpgrade: x\r\n", b"Connection: close\r\n", b"Host: [\r\n", b"Host: x\r\n", b" folded",
    b"Expect: 100-continue\r\n", b"\x80\xff", b"\x16\x03\x01", b"x" * 3000, b"X: y\r\n" * 30, b"{",
    b'"n": 2,', b"[" * 200,
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    pieces: tuple[bytes, ...]
    leaves: bool
    """The client goes away after the last one."""


@st.composite
def cases(draw: st.DrawFn) -> Case:
    data = b"".join(draw(st.lists(st.sampled_from(VALID), min_size=1, max_size=3)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        to = min(len(data), at + draw(st.integers(0, 8)))
        new = draw(st.sampled_from(WORDS) | st.binary(max_size=6) | st.just(data[at : at + 40]))
        data = data[:at] + new + data[to:]
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=4)))
    pieces = tuple(data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)]) if a < b)
    return Case(pieces, draw(st.integers(0, 9)) == 0)


@dataclass
class Bench:
    """A gateway before workers that write down what they get."""

    server: Server
    taps: list[Tap]
    port: int

    async def try_all(self, batch: list[Case]) -> None:
        async with asyncio.timeout(PATIENCE * 2):
            answers = await asyncio.gather(*(self._try(case) for case in batch))
        for case, answer in zip(batch, answers):
            assert not OURS & set(STATUS.findall(answer)), (case, answer)
        assert [tap.malformed for tap in self.taps] == [[]] * 3
        good = await self._try(Case((VALID[0].replace(b"\r\n", b"\r\nConnection: close\r\n", 1),), leaves=False))
        assert STATUS.findall(good) == [b"200"]
        await until(lambda: self.server.connections == 0)

    async def _try(self, case: Case) -> bytes:
        """What was answered until the gateway closed the connection."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            with contextlib.suppress(ConnectionError):
                for piece in case.pieces:
                    writer.write(piece)
                    await asyncio.sleep(0)
                if case.leaves:
                    return b""
                async with asyncio.timeout(PATIENCE):
                    return await reader.read()
            return b""
        finally:
            writer.transport.abort()


@contextlib.asynccontextmanager
async def bench() -> AsyncIterator[Bench]:
    config = GatewayConfig(port=0, drain_timeout=0.1, health_interval=0.1, split="always", retries=0)
    async with Tap() as p, Tap() as d, Tap() as r:
        listener, gateway = bind("127.0.0.1", 0), Gateway(config)
        server = Server(gateway, QUICK)
        try:
            for entry in workers([(p.url, 8998)], [d.url], [r.url]):
                gateway.roster.apply(entry)
            await server.listen([listener])
            registry = gateway.router.registry
            await until(lambda: len(registry.workers) == 3 and all(w.healthy for w in registry.workers))
            yield Bench(server, [p, d, r], listener.getsockname()[1])
            await until(lambda: gateway.metrics.in_flight == 0)
            await until(lambda: all(w.in_flight == 0 and w.load == 0 for w in registry.workers))
            assert [tap.leftovers() for tap in (p, d, r)] == [[]] * 3
            assert all(len(tap.seen) > CONNECTIONS for tap in (p, d)), "hardly anything reached a worker"
        finally:
            await server.close(0.1)
            await gateway.close()
            listener.close()


def test_almost_requests() -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        stack = contextlib.AsyncExitStack()
        one = runner.run(stack.enter_async_context(bench()))
        try:

            @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
            @given(st.lists(cases(), min_size=CONNECTIONS, max_size=CONNECTIONS))
            def attack(batch: list[Case]) -> None:
                runner.run(one.try_all(batch))

            attack()
        finally:
            runner.run(stack.aclose())
