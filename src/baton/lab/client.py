"""A lean HTTP client that stamps what arrives when it arrives, so that the generator does not distort what it measures.

One request at a time per connection, kept alive between requests. Every read from the socket is stamped once, before
anything is parsed; all events that it completes carry this stamp. (httpx and h11 cost several times more CPU per
chunk; on a small machine that time is taken from the server under test. Figures: docs/bench.md.)
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

import httptools

from baton.base.clock import Clock
from baton.base.errors import ConfigError

OnEvent = Callable[[bytes, float], None]
"""One server-sent event's data and when it arrived. Must not raise."""

LARGEST_ERROR_BODY = 2**16


class WireError(Exception):
    """The exchange did not complete. `kind` is one word for the statistics."""

    def __init__(self, kind: str, message: str, *, stale: bool = False) -> None:
        super().__init__(message)
        self.kind = kind
        self.stale = stale
        """The server had closed a kept connection before it saw the request: safe to send again."""


@dataclass(slots=True)
class Reply:
    """What came back besides events: everything of an answer that is not a stream."""

    status: int = 0
    body: bytes = b""
    at: float = 0.0
    """When the last byte arrived."""


class EventSplitter:
    """Bytes to the data of server-sent events, however they are cut."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> list[bytes]:
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        events = []
        for line in lines:
            line = line.rstrip(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events


@dataclass(slots=True)
class _Exchange:
    """One request on its way: what its connection has received of the answer so far."""

    on_event: OnEvent
    done: asyncio.Future[Reply]
    reply: Reply = field(default_factory=Reply)
    splitter: EventSplitter | None = None
    body: list[bytes] = field(default_factory=list)
    started: bool = False


class Connection(asyncio.Protocol):
    """One kept-alive connection. `exchange` is the only thing to do with it, one at a time."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._exchange: _Exchange | None = None
        self._now = 0.0
        self._exchanges = 0
        self.reusable = True

    async def exchange(self, request: bytes, on_event: OnEvent) -> Reply:
        """Send a request and wait for the end of the answer. Raises `WireError`; a cancel closes the connection."""
        assert self._exchange is None, "one exchange at a time"
        assert self._transport is not None
        exchange = self._exchange = _Exchange(on_event, asyncio.get_running_loop().create_future())
        self._exchanges += 1
        try:
            self._transport.write(request)
            return await exchange.done
        except BaseException:
            self.close()
            raise
        finally:
            self._exchange = None

    def close(self) -> None:
        self.reusable = False
        if self._transport is not None:
            self._transport.abort()

    # --- asyncio's calls -----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not inherit from it

    def data_received(self, data: bytes) -> None:
        self._now = self._clock.now()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail("protocol", f"not an HTTP answer: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        self.reusable = False
        exchange = self._exchange
        stale = exchange is not None and not exchange.started and self._exchanges > 1
        self._fail("disconnected", f"the server closed the connection before the end ({exc or 'EOF'})", stale=stale)

    # --- httptools' calls ----------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._exchange is not None:
            self._exchange.started = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._exchange is not None and name.lower() == b"content-type" and b"text/event-stream" in value.lower():
            self._exchange.splitter = EventSplitter()

    def on_headers_complete(self) -> None:
        if self._exchange is not None:
            self._exchange.reply.status = self._parser.get_status_code()

    def on_body(self, chunk: bytes) -> None:
        exchange = self._exchange
        if exchange is None:
            return
        if exchange.splitter is None:
            exchange.body.append(chunk)
            return
        for event in exchange.splitter.feed(chunk):
            exchange.on_event(event, self._now)

    def on_message_complete(self) -> None:
        exchange = self._exchange
        if exchange is None or exchange.reply.status < 200:  # 1xx: the answer proper follows
            return
        if not self._parser.should_keep_alive():
            self.reusable = False
        exchange.reply.body = b"".join(exchange.body)
        exchange.reply.at = self._now
        if not exchange.done.done():
            exchange.done.set_result(exchange.reply)

    def _fail(self, kind: str, message: str, *, stale: bool = False) -> None:
        if self._exchange is not None and not self._exchange.done.done():
            self._exchange.done.set_exception(WireError(kind, message, stale=stale))


class Client:
    """Requests to one server over as many connections as are needed at once; it owns them until `close`."""

    def __init__(self, url: str, clock: Clock, *, api_key: str = "", connect_timeout: float = 10.0) -> None:
        """Raises `ConfigError` for a URL that is not http or https."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f'url is "{url}"; write http://HOST:PORT')
        self._clock = clock
        self._host = parts.hostname
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._prefix = parts.path.rstrip("/")
        headers = [
            f"Host: {parts.netloc.rpartition('@')[2]}",
            "User-Agent: baton-bench",
            "Content-Type: application/json",
        ]
        if api_key:
            headers.append(f"Authorization: Bearer {api_key}")
        self._headers = "\r\n".join(headers)
        self._connect_timeout = connect_timeout
        self._idle: list[Connection] = []

    async def get(self, path: str) -> Reply:
        return await self._request(self._head("GET", path, 0), lambda data, at: None)

    async def post(self, path: str, body: bytes, on_event: OnEvent) -> Reply:
        """Raises `WireError`: connect, disconnected or protocol. Any status is an answer."""
        return await self._request(self._head("POST", path, len(body)) + body, on_event)

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    def _head(self, method: str, path: str, size: int) -> bytes:
        return f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._headers}\r\nContent-Length: {size}\r\n\r\n".encode()

    async def _request(self, request: bytes, on_event: OnEvent) -> Reply:
        while self._idle:
            connection = self._idle.pop()
            if not connection.reusable:
                continue
            try:
                return await self._exchange(connection, request, on_event)
            except WireError as error:
                if not error.stale:
                    raise
        return await self._exchange(await self._connect(), request, on_event)

    async def _exchange(self, connection: Connection, request: bytes, on_event: OnEvent) -> Reply:
        reply = await connection.exchange(request, on_event)
        if connection.reusable:
            self._idle.append(connection)
        else:
            connection.close()
        return reply

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout):
                _, connection = await loop.create_connection(
                    lambda: Connection(self._clock), self._host, self._port, ssl=self._tls
                )
        except TimeoutError as error:
            raise WireError(
                "connect", f"{self._host}:{self._port} did not accept within {self._connect_timeout} s"
            ) from error
        except OSError as error:
            raise WireError("connect", f"cannot reach {self._host}:{self._port}: {error}") from error
        return connection
