"""One client's socket: bytes become requests, strictly.

A proxy that reads a message otherwise than the servers behind it can be made to smuggle requests (RFC 9112, 11.2). So
the parser (llhttp, none of its leniencies) refuses bare LF, folded headers, conflicting or odd lengths; `_faults`
refuses other transfer codings than `chunked`, any in HTTP/1.0, anything but one `Host`; `urls` whatever has two
meanings. What was refused is answered, after the requests before it, and nothing more is read as a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import socket
import struct
from collections import deque
from typing import TYPE_CHECKING, cast

import httptools

from baton.gateway import urls
from baton.gateway.answer import HttpAnswer
from baton.gateway.bounds import Refusal
from baton.gateway.door import Inbound
from baton.router.call import Header
from baton.router.legs import Pulse

if TYPE_CHECKING:
    from baton.gateway.server import Server

log = logging.getLogger("baton.gateway")

SMALL_BODY = 64 << 10
"""Bytes of a body that are read before it is known who sends it."""
MAX_PIPELINED = 64
"""Requests that one connection may send ahead of their answers, and"""
MAX_AHEAD = 1 << 20
"""bytes of their bodies; then nothing more is read from it until one is answered."""
LINGER_BYTES = 32 << 20
"""What is read and thrown away after a refusal."""
NO_LINGER = struct.pack("ii", 1, 0)
"""For `SO_LINGER`: the close is a reset."""
FRAMING = 8
"""Bytes of chunk sizes, extensions and trailers that a body may have for each of its own."""
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
METHODS = frozenset({b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS"})
HOST = re.compile(rb"(?:[A-Za-z0-9._~!$&'()*+,;=%-]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]*)?")


class Connection(asyncio.Protocol):
    """Requests are parsed as they come, and answered one after the other. A client that closes its sending side has
    left: nothing tells it from one that has gone, and nobody computes for those."""

    __slots__ = (
        "_ahead",
        "_answer",
        "_body",
        "_expects",
        "_head_size",
        "_headers",
        "_heard",
        "_host",
        "_large",
        "_linger",
        "_moved",
        "_parser",
        "_paused",
        "_peer",
        "_pulse",
        "_raw",
        "_refusal",
        "_server",
        "_since",
        "_size",
        "_stage",
        "_transport",
        "_unread",
        "_unsent",
        "_upgrades",
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
        """idle, head, body; over: what comes is no longer read as requests"""
        self._since = 0.0
        """Of the stage idle or over, or since the request began that has not come as a whole."""
        self._heard = 0.0
        """The last piece of such a request."""
        self._raw = 0
        """Bytes of it, without those that came in one piece with its beginning; -1: nothing but these came."""
        self._url = b""
        self._headers: list[Header] = []
        self._head_size = 0
        self._host = b""
        """The last one that was found to be good."""
        self._body: bytes | bytearray = b""
        self._size = 0
        self._expects = False
        self._large = False
        """More of a body is announced than anybody may send."""
        """It waits for a `100 Continue`."""
        self._upgrades = False
        self._refusal: Refusal | None = None
        self._unread = False
        """The client may still be sending what nobody wants."""
        self._linger = LINGER_BYTES
        self._answer: HttpAnswer | None = None
        self._pulse: Pulse | None = None
        self._waiting: deque[tuple[Inbound, str, bool]] = deque()
        self._ahead = 0
        """Bytes of the bodies that wait."""
        self._paused = False
        """Nothing is read, because too much waits."""
        self._unsent = 0
        self._moved = 0.0
        """When `_unsent`, the bytes that the client has not taken, last changed."""
        self.closing = False
        self.full: asyncio.Future[None] | None = None

    # --- for HttpAnswer

    def send(self, data: bytes) -> None:
        self._transport.write(data)

    def drop(self, *, reset: bool = False) -> None:
        if reset:
            with contextlib.suppress(OSError):
                self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
        self._transport.abort()

    def answered(self, *, keep_alive: bool) -> None:
        """The present request is over."""
        self._answer = self._pulse = None
        if not keep_alive:
            self._close()
        elif self._waiting:
            inbound, version, keep_alive = self._waiting.popleft()
            self._ahead -= len(inbound.body)
            self._begin(inbound, version, keep_alive)
            if self._paused and self._ahead <= MAX_AHEAD:
                self._paused = False
                self._since = self._heard = self._server.loop.time()
                self._transport.resume_reading()
        elif self._refusal is not None:
            self._refuse(self._refusal)
        elif self._stage == "idle":
            self._since = self._server.loop.time()
        elif self._expects:
            self._continue()

    # --- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername")
        self._peer = str(peer[0]) if isinstance(peer, tuple) else ""
        self._since = self._server.loop.time()
        self._server.opened(self)

    def data_received(self, data: bytes) -> None:
        if self._stage == "over":
            self._linger -= len(data)
            if self._linger < 0:
                self._transport.abort()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if self._refusal is None:
                self._ignore_upgrade(data[upgrade.args[0] :])
                return
        except httptools.HttpParserCallbackError:
            log.exception("a fault in the server")
            self._refusal = self._refusal or Refusal(500, "internal_error", "the gateway failed; see its log")
        except httptools.HttpParserError as error:
            wrong = Refusal(400, "bad_request", f"this is not a valid HTTP/1.1 request: {error}")
            self._refusal = self._refusal or wrong
        if self._stage != "idle":
            self._unfinished(len(data))
        if self._refusal is not None:
            self.refuse(self._refusal)

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
        self._stage, self._raw = "head", -1
        self._url, self._headers, self._head_size = b"", [], 0
        self._body, self._size = b"", 0

    def on_url(self, url: bytes) -> None:
        self._url = self._url + url if self._url else url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._stage != "head":
            return  # a trailer
        self._head_size += len(name) + len(value) + 4
        if self._head_size <= self._server.bounds.head:
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self._stage = "body"
        self._expects = self._upgrades = False
        self._refusal = self._refusal or self._faults()
        if self._refusal is None and self._large:
            self._refusal = self._server.app.unwelcome(self._url, self._headers)

    def on_body(self, data: bytes) -> None:
        self._size += len(data)
        if self._size > self._server.bounds.body:
            self._refusal = self._refusal or self._server.bounds.body_too_large()
        elif not self._body:
            self._body = data
        else:
            if isinstance(self._body, bytes):
                self._body = bytearray(self._body)
            self._body += data  # a list of pieces would take fifty times the memory, if they are small enough

    def on_message_complete(self) -> None:
        self._stage = "idle"
        self._expects = False
        if self._refusal is not None or self._upgrades:
            return
        parser = self._parser
        try:
            path, query = urls.split(self._url.decode("ascii"))
        except ValueError:
            self._refusal = Refusal(400, "bad_request", "the request's path is not one in normal form")
            return
        keep_alive, version = parser.should_keep_alive(), parser.get_http_version()
        method, body = parser.get_method().decode("ascii"), bytes(self._body)
        inbound = Inbound(method, path, query, self._headers, body, self._peer)
        if self._answer is None:
            self._begin(inbound, version, keep_alive)
        elif len(self._waiting) < MAX_PIPELINED:
            self._waiting.append((inbound, version, keep_alive))
            self._ahead += len(body)
            if self._ahead > MAX_AHEAD and not self._paused:
                self._paused = True
                self._transport.pause_reading()
        else:
            message = f"more than {MAX_PIPELINED} requests sent ahead on one connection"
            self._refusal = Refusal(429, "rate_limited", message)

    # --- for Server

    def sweep(self, now: float) -> None:
        """Look for a client that is too slow."""
        bounds, stage, waited = self._server.bounds, self._stage, now - self._since
        if self._stuck(now, bounds.send_seconds):
            self._transport.abort()
        elif stage == "over":
            if self._answer is None and not self._unsent and waited > bounds.linger:
                self._transport.abort()
        elif stage == "idle":
            if self._answer is None and waited > (bounds.parting if self.closing else bounds.keep_alive):
                self._close()
        elif self.closing and stage == "head" and waited > bounds.parting:
            self._close()
        elif self._paused:
            pass
        elif (
            waited > bounds.head_seconds
            if stage == "head"
            else now - self._heard > bounds.body_seconds
            or waited > bounds.head_seconds + bounds.body_seconds + self._size / bounds.body_rate
        ):
            self.refuse(Refusal(408, "request_timeout", f"the rest of the request did not come in {waited:.0f} s"))

    def finish(self) -> None:
        """No further requests on this connection. Closed at once is what was idle for a while; others may be about to
        send, or are sending: they are answered, and told that it was the last time."""
        self.closing = True
        waited = self._server.loop.time() - self._since
        if self._answer is None and self._stage == "idle" and waited > self._server.bounds.parting:
            self._close()

    def refuse(self, refusal: Refusal) -> None:
        """Nothing more is read as a request: where the next one would begin is not known. What came before is answered
        first."""
        self._stage, self._since = "over", self._server.loop.time()
        self._refusal, self._unread = refusal, True
        self._body = b""
        if self._answer is None:
            self._refuse(refusal)

    # ---

    def _begin(self, inbound: Inbound, version: str, keep_alive: bool) -> None:
        server = self._server
        head_only = inbound.method == "HEAD"
        answer = HttpAnswer(self, version, server.date, keep_alive=keep_alive, head_only=head_only)
        pulse = Pulse(server.loop)
        self._answer, self._pulse = answer, pulse
        server.start(inbound, answer, pulse)

    def _refuse(self, refusal: Refusal) -> None:
        path = self._url.partition(b"?")[0].decode("ascii", "replace")
        headers, body = self._server.app.refused(path, *refusal)
        answer = HttpAnswer(self, "1.1", self._server.date, keep_alive=False, head_only=False)
        answer.start(refusal.status, headers, len(body))
        self._answer = answer
        self._server.refused(refusal.status)
        answer.write(body, more=False)

    def _unfinished(self, size: int) -> None:
        """A piece has come, and the request is not whole yet."""
        now = self._heard = self._server.loop.time()
        if self._raw < 0:
            self._raw, self._since = 0, now
        else:
            self._raw += size
        head = self._server.bounds.head
        if self._stage == "head":
            if self._raw > head:
                self._refusal = self._refusal or self._server.bounds.head_too_large()
        elif self._raw > 2 * head + (FRAMING + 1) * self._size:
            message = "the body has more chunk sizes, extensions and trailers than data"
            self._refusal = self._refusal or Refusal(400, "bad_request", message)
        elif self._expects and self._answer is None and self._refusal is None:
            self._continue()

    def _continue(self) -> None:
        self._expects = False
        if not self._size:
            self._transport.write(CONTINUE)

    def _ignore_upgrade(self, rest: bytes) -> None:
        """An offer of another protocol (Java's client makes one with each request) is not taken, so the request means
        what it would mean without. The parser cannot be told so: it gets the head again without the offer."""
        version = self._parser.get_http_version().encode("ascii")
        lines = [b"%b %b HTTP/%b\r\n" % (self._parser.get_method(), self._url, version)]
        lines += [b"%b: %b\r\n" % header for header in self._headers if header[0] != b"upgrade"]
        self._parser = httptools.HttpRequestParser(self)
        self.data_received(b"".join(lines) + b"\r\n" + rest)

    def _faults(self) -> Refusal | None:
        """What is wrong with the head, beyond what the parser sees."""
        parser, bounds = self._parser, self._server.bounds
        hosts, version = 0, parser.get_http_version()
        self._large = False
        for name, value in self._headers:
            if name == b"host":
                hosts += 1
                if value != self._host and not HOST.fullmatch(value):
                    return Refusal(400, "bad_request", "the Host header is not valid")
                self._host = value
            elif name == b"content-length":
                if len(value) > 32:
                    return Refusal(400, "bad_request", "the Content-Length header is not valid")
                if int(value) > bounds.body:
                    return bounds.body_too_large()
                self._large = int(value) > SMALL_BODY
            elif name == b"transfer-encoding":
                if value.strip().lower() != b"chunked" or version != "1.1":
                    return Refusal(501, "not_implemented", "the only transfer coding here is chunked, in HTTP/1.1")
                self._large = True
            elif name == b"expect":
                self._expects = value.lower() == b"100-continue" and version == "1.1"
            elif name == b"upgrade":
                self._upgrades = parser.should_upgrade()
        if self._head_size + len(self._url) > bounds.head or len(self._headers) > bounds.headers:
            return bounds.head_too_large()
        if version not in ("1.0", "1.1"):
            return Refusal(505, "http_version_not_supported", "this server speaks HTTP/1.1")
        if hosts > 1 or (hosts == 0 and version == "1.1"):
            return Refusal(400, "bad_request", f"a request has one Host header, this one has {hosts}")
        if parser.get_method() not in METHODS:
            return Refusal(501, "not_implemented", "this server knows no such method")
        return None

    def _stuck(self, now: float, seconds: float) -> bool:
        """The client has not taken a byte of what waits for it, for so long."""
        unsent = self._transport.get_write_buffer_size()
        if unsent != self._unsent:
            self._unsent, self._moved = unsent, now
        return unsent > 0 and now - self._moved > seconds

    def _close(self) -> None:
        """After what has been written. A client that still writes is read on for a moment."""
        unread = self._unread or self._stage in ("head", "body")
        self._stage, self._since = "over", self._server.loop.time()
        if not unread:
            self._transport.close()
        elif self._transport.can_write_eof():
            with contextlib.suppress(OSError, RuntimeError):
                self._transport.write_eof()
