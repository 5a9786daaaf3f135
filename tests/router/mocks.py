"""Workers that behave, or misbehave on purpose: raw HTTP/1.1 over asyncio, one coroutine per request."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, cast

import httptools
import uvloop


def run(main: Coroutine[Any, Any, None], timeout: float = 20.0) -> None:
    """Run a test in a loop of its own; nothing may be left in it."""

    async def watched() -> None:
        await asyncio.wait_for(main, timeout)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, f"tasks left: {left}"

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(watched())


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait for something another coroutine does; fails after `seconds`."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)


class Exchange:
    """A request as the mock saw it, and the way to answer."""

    def __init__(self, method: str, path: str, headers: dict[str, str], body: bytes, transport: asyncio.Transport):
        self.method, self.path, self.headers, self.body = method, path, headers, body
        self.transport = transport
        self.gone = asyncio.Event()
        """The client closed the connection before the answer was over."""

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def raw(self, data: bytes) -> None:
        self.transport.write(data)

    def whole(self, body: Any, status: int = 200, headers: str = "content-type: application/json\r\n") -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.raw(f"HTTP/1.1 {status} X\r\n{headers}content-length: {len(data)}\r\n\r\n".encode() + data)

    def begin_stream(self, headers: str = "") -> None:
        head = f"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n{headers}transfer-encoding: chunked\r\n\r\n"
        self.raw(head.encode())

    def piece(self, data: bytes) -> None:
        self.raw(b"%x\r\n%b\r\n" % (len(data), data))

    def end_stream(self) -> None:
        self.raw(b"0\r\n\r\n")

    def reset(self) -> None:
        self.transport.abort()


Behaviour = Callable[[Exchange], Awaitable[None]]


class _Connection(asyncio.Protocol):
    def __init__(self, mock: Mock) -> None:
        self.mock = mock
        self.task: asyncio.Task[None] | None = None
        self.exchange: Exchange | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.parser = httptools.HttpRequestParser(self)
        self.mock.connections.add(self)
        self.mock.accepted += 1

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_message_begin(self) -> None:
        self.path, self.headers, self.body = b"", dict[str, str](), b""

    def on_url(self, url: bytes) -> None:
        self.path += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode().lower()] = value.decode()

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        method = self.parser.get_method().decode()
        self.exchange = Exchange(method, self.path.decode(), self.headers, self.body, self.transport)
        self.task = asyncio.get_running_loop().create_task(self.mock.answer(self.exchange))

    def connection_lost(self, exc: Exception | None) -> None:
        self.mock.connections.discard(self)
        if self.task is not None and not self.task.done():
            assert self.exchange is not None
            self.exchange.gone.set()


class Mock:
    """One worker. `seen` are the requests beside health and info, in order."""

    def __init__(
        self, behave: Behaviour, info: dict[str, Any] | None = None, tls: ssl.SSLContext | None = None
    ) -> None:
        self.behave = behave
        self.tls = tls
        self.info = info or {}
        self.health = 200
        self.frozen = False
        """Takes what comes, and answers nothing any more."""
        self.seen: list[Exchange] = []
        self.probes = 0
        self.accepted = 0
        self.port = 0
        self.connections: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        return f"{'http' if self.tls is None else 'https'}://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Mock:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen; again at the same port after `stop`."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), "127.0.0.1", self.port, ssl=self.tls)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """As if killed: connections are reset, nobody listens."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
        tasks = list(self._tasks)
        for connection in list(self.connections):
            connection.transport.abort()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if server is not None:
            await server.wait_closed()

    async def answer(self, exchange: Exchange) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if self.frozen:
            await exchange.gone.wait()
            return
        if exchange.path == "/health":
            self.probes += 1
            exchange.whole({}, self.health)
        elif exchange.path == "/server_info":
            exchange.whole(self.info)
        elif exchange.path == "/version":
            exchange.whole({}, 404)
        else:
            self.seen.append(exchange)
            await self.behave(exchange)


# --- behaviours


def whole(body: Any, status: int = 200, delay: float = 0.0) -> Behaviour:
    async def behave(exchange: Exchange) -> None:
        await asyncio.sleep(delay)
        exchange.whole(body, status)

    return behave


def events(*pieces: bytes, gap: float = 0.0, delay: float = 0.0, end: bool = True, headers: str = "") -> Behaviour:
    """A stream of `pieces`, each in a chunk of its own."""

    async def behave(exchange: Exchange) -> None:
        await asyncio.sleep(delay)
        exchange.begin_stream(headers)
        for piece in pieces:
            exchange.piece(piece)
            if gap:
                await asyncio.sleep(gap)
        if end:
            exchange.end_stream()

    return behave


async def hang(exchange: Exchange) -> None:
    """Never answers; ends when the client goes."""
    await exchange.gone.wait()


async def reset(exchange: Exchange) -> None:
    exchange.reset()


async def garbage(exchange: Exchange) -> None:
    exchange.raw(b"\x16\x03\x01 this is not HTTP at all\r\n\r\n")


async def stream_then_hang(exchange: Exchange) -> None:
    exchange.begin_stream()
    exchange.piece(b'data: {"n":0}\n\n')
    await exchange.gone.wait()


async def stream_then_reset(exchange: Exchange) -> None:
    exchange.begin_stream()
    exchange.piece(b'data: {"n":0}\n\ndata: {"n"')
    await asyncio.sleep(0.02)
    exchange.reset()
