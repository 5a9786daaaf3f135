"""An HTTP/1.1 server for one application: a protocol per connection, a task per request, and nothing else.

    socket ── Connection (httptools parses) ──▶ Inbound ──▶ application ──▶ HttpAnswer ── bytes ──▶ socket

Strict on purpose, because a proxy that reads a message otherwise than the servers behind it can be made to smuggle
requests (RFC 9112, 11.2): the parser refuses bare LF, folded headers, conflicting or odd lengths; this file refuses
other transfer codings than `chunked`, any in HTTP/1.0, and anything but one `Host`. Every wait for a client has an end:
one sweep a second over all connections looks for those that are too slow.
"""

from __future__ import annotations

import asyncio
import contextlib
import http
import logging
import socket
import ssl
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import httptools

from baton.gateway.door import Application, Inbound
from baton.router.call import Header
from baton.router.legs import Pulse

log = logging.getLogger("baton.gateway")

MAX_PIPELINED = 64
"""Requests that one connection may send ahead of their answers."""
LINGER_SECONDS = 2.0
"""How long a connection whose client still writes is read on after a refusal: a close with unread bytes would be a
reset, and the client would never see why."""
LINGER_BYTES = 32 << 20
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
STATUS_LINES = {s.value: b"HTTP/1.1 %d %b\r\n" % (s.value, s.phrase.encode()) for s in http.HTTPStatus}
STATUS_LINES[499] = b"HTTP/1.1 499 Client Closed Request\r\n"
BODILESS = frozenset({204, 304})


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a client may take of us."""

    body: int = 8 << 20
    """Bytes."""
    head: int = 64 << 10
    """Bytes of request line and headers."""
    headers: int = 128
    keep_alive: float = 75.0
    """Seconds an idle connection stays open."""
    head_seconds: float = 10.0
    """From the first byte of a head to its end."""
    body_seconds: float = 30.0
    """Between two pieces of a body."""


class HttpAnswer:
    """An `Answer` on a connection. The head waits for the first piece of the body, so that both leave together."""

    __slots__ = ("_connection", "_framed", "_head", "_keep_alive", "_silent", "_version", "ended", "status")

    def __init__(self, connection: Connection, version: str, *, keep_alive: bool, head_only: bool) -> None:
        self._connection: Connection | None = connection
        self._version = version
        self._keep_alive = keep_alive
        self._silent = head_only
        self._framed = False
        """In chunks."""
        self._head = b""
        self.status = 0
        self.ended = False

    @property
    def paused(self) -> bool:
        return self._connection is not None and self._connection.full is not None

    async def drained(self) -> None:
        while self._connection is not None and self._connection.full is not None:
            await asyncio.shield(self._connection.full)

    def start(self, status: int, headers: Sequence[Header], length: int | None = None) -> None:
        self.status = status
        connection = self._connection
        if connection is None:
            return
        keep = self._keep_alive = self._keep_alive and not connection.closing
        lines = [STATUS_LINES.get(status) or b"HTTP/1.1 %d Unknown\r\n" % status]
        lines += [b"%b: %b\r\n" % header for header in headers]
        if status in BODILESS:
            self._silent = True
        elif length is not None:
            lines.append(b"content-length: %d\r\n" % length)
        elif self._version == "1.1":
            self._framed = True
            lines.append(b"transfer-encoding: chunked\r\n")
        else:
            keep = self._keep_alive = False  # HTTP/1.0: the close is the end
        if not keep:
            lines.append(b"connection: close\r\n")
        elif self._version == "1.0":
            lines.append(b"connection: keep-alive\r\n")
        lines.append(b"\r\n")
        self._head = b"".join(lines)

    def write(self, data: bytes, *, more: bool) -> None:
        connection = self._connection
        if connection is None or self.ended:
            return
        if self._silent:
            data = b""
        elif self._framed:
            if data:
                data = b"%x\r\n%b\r\n" % (len(data), data)
            if not more:
                data += b"0\r\n\r\n"
        if self._head:
            data = self._head + data
            self._head = b""
        if data:
            connection.send(data)
        if not more:
            self.ended = True
            self._connection = None
            connection.answered(keep_alive=self._keep_alive)

    def abort(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None and not self.ended:
            self.ended = True
            connection.drop()

    def left(self) -> None:
        """The client is gone: nothing that is written from now on goes anywhere."""
        self._connection = None


class Connection(asyncio.Protocol):
    """One client's socket: requests are parsed as they come, and answered one after the other."""

    __slots__ = (
        "_answer",
        "_body",
        "_expects",
        "_head_size",
        "_headers",
        "_linger",
        "_parser",
        "_peer",
        "_pulse",
        "_refusal",
        "_server",
        "_since",
        "_size",
        "_stage",
        "_transport",
        "_url",
        "_waiting",
        "closing",
        "full",
    )

    def __init__(self, server: Server) -> None:
        self._server = server
        self._parser = httptools.HttpRequestParser(self)
        self._transport = cast(asyncio.Transport, None)
        self._peer = ""
        self._stage = "idle"
        """idle, head, body, refused"""
        self._since = 0.0
        """Of the stage (idle, head), or of the last piece (body, refused)."""
        self._url = b""
        self._headers: list[Header] = []
        self._head_size = 0
        self._body: list[bytes] = []
        self._size = 0
        self._expects = False
        self._refusal: tuple[int, str, str] | None = None
        self._linger = LINGER_BYTES
        self._answer: HttpAnswer | None = None
        self._pulse: Pulse | None = None
        self._waiting: deque[tuple[Inbound, str, bool]] = deque()
        self.closing = False
        """After the present answer."""
        self.full: asyncio.Future[None] | None = None
        """The socket takes no more for now."""

    # --- for HttpAnswer

    def send(self, data: bytes) -> None:
        self._transport.write(data)

    def drop(self) -> None:
        self._transport.abort()

    def answered(self, *, keep_alive: bool) -> None:
        """The present request is over."""
        self._answer = self._pulse = None
        if not keep_alive or self.closing:
            self._close()
        elif self._waiting:
            self._begin(*self._waiting.popleft())
        elif self._stage == "idle":
            self._since = self._server.loop.time()

    # --- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername")
        self._peer = str(peer[0]) if isinstance(peer, tuple) else ""
        self._since = self._server.loop.time()
        self._server.opened(self)

    def data_received(self, data: bytes) -> None:
        if self._stage == "refused":
            self._linger -= len(data)
            if self._linger < 0:
                self._transport.abort()
            return
        if self._stage == "body":
            self._since = self._server.loop.time()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self.closing = True  # we speak HTTP/1.1 and nothing else: what follows is not read
            if self._answer is None:
                self._close()
            return
        except httptools.HttpParserError as error:
            if not self.closing:
                self._refusal = self._refusal or (400, "bad_request", f"this is not a valid HTTP/1.1 request: {error}")
        if self._stage == "head":
            self._head_size = max(self._head_size, len(data))
            if self._head_size > self._server.bounds.head:
                self._refusal = self._refusal or self._head_too_large()
        if self._refusal is not None:
            self._refuse(*self._refusal)

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.closed(self)
        self._waiting.clear()
        self.resume_writing()
        if self._answer is not None:
            self._answer.left()
        if self._pulse is not None:
            self._pulse.leave()
        self._answer = self._pulse = None

    def pause_writing(self) -> None:
        if self.full is None:
            self.full = self._server.loop.create_future()

    def resume_writing(self) -> None:
        full, self.full = self.full, None
        if full is not None and not full.done():
            full.set_result(None)

    # --- httptools

    def on_message_begin(self) -> None:
        self._stage, self._since = "head", self._server.loop.time()
        self._url, self._headers, self._head_size = b"", [], 0
        self._body, self._size, self._expects = [], 0, False

    def on_url(self, url: bytes) -> None:
        self._url = self._url + url if self._url else url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._stage != "head":
            return  # a trailer
        self._head_size += len(name) + len(value) + 4
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        refusal = self._faults()
        if refusal is not None:
            self._refusal = self._refusal or refusal
        self._stage = "body"
        if self._expects and self._refusal is None and self._answer is None:
            self._transport.write(CONTINUE)

    def on_body(self, data: bytes) -> None:
        self._size += len(data)
        if self._size > self._server.bounds.body:
            self._refusal = self._refusal or self._body_too_large()
        else:
            self._body.append(data)

    def on_message_complete(self) -> None:
        self._stage = "idle"
        if self._refusal is not None:
            return
        parser, body = self._parser, self._body
        keep_alive, version = parser.should_keep_alive(), parser.get_http_version()
        path, _, query = self._url.decode("ascii").partition("?")
        inbound = Inbound(
            parser.get_method().decode("ascii"),
            path if path.startswith("/") else _origin_form(path),
            query,
            self._headers,
            body[0] if len(body) == 1 else b"".join(body),
            self._peer,
        )
        if self._answer is None:
            self._begin(inbound, version, keep_alive)
        elif len(self._waiting) < MAX_PIPELINED:
            self._waiting.append((inbound, version, keep_alive))
        else:
            self._refusal = (429, "rate_limited", f"more than {MAX_PIPELINED} requests sent ahead on one connection")

    # ---

    def sweep(self, now: float) -> None:
        """Look for a client that is too slow."""
        bounds, waited = self._server.bounds, now - self._since
        if self._stage == "refused":
            if waited > LINGER_SECONDS:
                self._transport.abort()
        elif self._stage == "idle":
            if self._answer is None and waited > bounds.keep_alive:
                self._close()
        elif waited > (bounds.head_seconds if self._stage == "head" else bounds.body_seconds):
            self._refuse(408, "request_timeout", f"the rest of the request did not come within {waited:.0f} s")

    def finish(self) -> None:
        """No further requests on this connection."""
        self.closing = True
        if self._answer is None and self._stage != "refused":
            self._close()

    def _begin(self, inbound: Inbound, version: str, keep_alive: bool) -> None:
        answer = HttpAnswer(self, version, keep_alive=keep_alive, head_only=inbound.method == "HEAD")
        pulse = Pulse(self._server.loop)
        self._answer, self._pulse = answer, pulse
        self._server.start(inbound, answer, pulse)

    def _faults(self) -> tuple[int, str, str] | None:
        """What is wrong with the head, beyond what the parser sees."""
        hosts, version, bounds = 0, self._parser.get_http_version(), self._server.bounds
        for name, value in self._headers:
            if name == b"host":
                hosts += 1
            elif name == b"content-length" and int(value) > bounds.body:
                return self._body_too_large()
            elif name == b"transfer-encoding" and (value.strip().lower() != b"chunked" or version != "1.1"):
                return 501, "not_implemented", "the only transfer coding here is chunked, in HTTP/1.1"
            elif name == b"expect":
                self._expects = value.lower() == b"100-continue"
        if len(self._headers) > bounds.headers or self._head_size > bounds.head:
            return self._head_too_large()
        if version not in ("1.0", "1.1"):
            return 505, "http_version_not_supported", "this server speaks HTTP/1.1"
        if hosts > 1 or (hosts == 0 and version == "1.1"):
            return 400, "bad_request", f"a request has one Host header, this one has {hosts}"
        return None

    def _body_too_large(self) -> tuple[int, str, str]:
        limit = self._server.bounds.body
        return (
            413,
            "payload_too_large",
            f"the request body is larger than {limit} bytes, which is what this gateway takes",
        )

    def _head_too_large(self) -> tuple[int, str, str]:
        bounds = self._server.bounds
        return (
            431,
            "header_too_large",
            f"a request head has at most {bounds.head} bytes and {bounds.headers} headers here",
        )

    def _refuse(self, status: int, code: str, message: str) -> None:
        """Answer what is no request, and part: where the next one would begin is not known."""
        self._stage, self._since = "refused", self._server.loop.time()
        self.closing = True
        self._waiting.clear()
        self._body = []
        if self._answer is not None:
            return  # the one before it is answered first, and the connection closed then
        path = self._url.partition(b"?")[0].decode("ascii", "replace")
        headers, body = self._server.app.refused(path, status, code, message)
        answer = HttpAnswer(self, "1.1", keep_alive=False, head_only=False)
        answer.start(status, headers, len(body))
        self._answer = answer
        answer.write(body, more=False)
        self._server.refused(status)

    def _close(self) -> None:
        """After what has been written. A client that still writes is read on for a moment."""
        if self._stage in ("refused", "body", "head"):
            self._stage, self._since = "refused", self._server.loop.time()
            if self._transport.can_write_eof():
                with contextlib.suppress(OSError, RuntimeError):
                    self._transport.write_eof()
                return
        self._transport.close()


class Server:
    """Listens on sockets it is given. `close` ends it: politely for a while, then not."""

    def __init__(self, app: Application, bounds: Bounds, ssl_context: ssl.SSLContext | None = None) -> None:
        self.app = app
        self.bounds = bounds
        self.loop = asyncio.get_running_loop()
        self.refusals: dict[int, int] = {}
        """By status: answers to what was no request."""
        self._ssl = ssl_context
        self._servers: list[asyncio.AbstractServer] = []
        self._connections: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._sweeper: asyncio.TimerHandle | None = None
        self._empty: asyncio.Future[None] | None = None
        self._stops = 0
        self._stopped = asyncio.Event()

    @property
    def connections(self) -> int:
        return len(self._connections)

    async def listen(self, sockets: Sequence[socket.socket]) -> None:
        for one in sockets:
            self._servers.append(await self.loop.create_server(lambda: Connection(self), sock=one, ssl=self._ssl))
        self._sweeper = self.loop.call_later(1.0, self._sweep)

    def stop(self) -> None:
        """The first time: let requests finish. The second time: do not."""
        self._stops += 1
        self._stopped.set()
        if self._stops > 1:
            self._abort()

    async def stopped(self) -> None:
        """Until somebody calls `stop`."""
        await self._stopped.wait()

    async def close(self, patience: float) -> None:
        """Take nothing more; let requests finish, for `patience` seconds at most; then break them off. Idempotent."""
        for server in self._servers:
            server.close()
        for connection in list(self._connections):
            connection.finish()
        if self._connections and self._stops < 2:
            await self._emptied(patience)
        self._abort()
        if self._connections:
            await self._emptied(5.0)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=5.0)
        if self._sweeper is not None:
            self._sweeper.cancel()

    # --- for Connection

    def opened(self, connection: Connection) -> None:
        self._connections.add(connection)

    def closed(self, connection: Connection) -> None:
        self._connections.discard(connection)
        if self._empty is not None and not self._connections and not self._empty.done():
            self._empty.set_result(None)

    def start(self, inbound: Inbound, answer: HttpAnswer, pulse: Pulse) -> None:
        task = self.loop.create_task(self._serve(inbound, answer, pulse))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def refused(self, status: int) -> None:
        self.refusals[status] = self.refusals.get(status, 0) + 1

    # ---

    async def _serve(self, inbound: Inbound, answer: HttpAnswer, pulse: Pulse) -> None:
        try:
            await self.app(inbound, answer, pulse)
        except Exception:
            log.exception("%s %s", inbound.method, inbound.path)
            if not answer.status:
                headers, body = self.app.refused(inbound.path, 500, "internal_error", "the gateway failed; see its log")
                answer.start(500, headers, len(body))
                answer.write(body, more=False)
        finally:
            answer.abort()  # nothing, if it has ended

    def _sweep(self) -> None:
        now = self.loop.time()
        for connection in list(self._connections):
            connection.sweep(now)
        self._sweeper = self.loop.call_later(1.0, self._sweep)

    def _abort(self) -> None:
        for connection in list(self._connections):
            connection.drop()

    async def _emptied(self, seconds: float) -> None:
        self._empty = self.loop.create_future()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._empty


def _origin_form(url: str) -> str:
    """The path of `http://host/path`, which a client that takes us for its proxy sends."""
    _, marker, rest = url.partition("://")
    return "/" + rest.partition("/")[2] if marker else url
