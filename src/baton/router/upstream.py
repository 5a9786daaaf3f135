"""A lean pooled HTTP/1.1 client: requests are bytes, replies are bytes, nothing is a task once a connection stands.

    Pool (one worker) ── send(call, request) ──▶ Call ◀── Connection (socket + parser) fills it in, then calls `notify`

Cancelling a call closes its connection, which is how a worker learns that nobody waits any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
from collections.abc import Callable
from typing import cast

import httptools

from baton.router.call import Call, Failure, Fault
from baton.router.origin import Origin

MAX_HEAD = 64 * 1024
IDLE_SECONDS = 55.0
"""Idle connections are closed after this; the worker usually does it earlier, which is seen at once."""


class Connection(asyncio.Protocol):
    """One socket to a worker with its parser; carries one call at a time."""

    __slots__ = (
        "_call",
        "_delimited",
        "_first",
        "_head",
        "_parser",
        "_pool",
        "_spent",
        "_transport",
        "reused",
        "since",
    )

    def __init__(self, pool: Pool, first: Call) -> None:
        self._pool = pool
        self._first: Call | None = first
        """What it was opened for; sent as soon as it stands. If that was cancelled meanwhile, the next call gets it."""
        self._parser = httptools.HttpResponseParser(self)
        self._call: Call | None = None
        self._transport = cast(asyncio.Transport, None)
        self._spent = False
        """Not to be used for another call."""
        self._delimited = False
        self._head = 0
        self.reused = False
        self.since = 0.0

    def start(self, call: Call) -> None:
        self._call = call
        self._delimited = False
        self._head = 0
        call.bind(self)
        self._transport.write(call.request)
        call.request = b""

    def alive(self) -> bool:
        return not self._transport.is_closing()

    def drop(self) -> None:
        """Close without delay; a call in progress hears nothing more from us."""
        self._call = None
        self._transport.abort()

    def break_off(self, failure: Failure) -> None:
        """Close without delay; a call in progress fails."""
        call = self._call
        self.drop()
        if call is not None:
            call.end(failure)
            call.tell()

    def pause(self) -> None:
        self._transport.pause_reading()

    def resume(self) -> None:
        self._transport.resume_reading()

    # --- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._pool._opened(self)
        call, self._first = self._first, None
        if call is None or call.done:
            self._pool._back(self)
        else:
            self.start(call)

    def data_received(self, data: bytes) -> None:
        call = self._call
        if call is None:  # bytes nobody asked for: this connection is out of step
            self._transport.abort()
            return
        if not call.status:
            self._head += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._garbage(call, f"the reply is not valid HTTP ({error})")
            return
        if not call.status and self._head > MAX_HEAD:
            self._garbage(call, f"more than {MAX_HEAD} bytes of reply head")
            return
        call.last = self._pool.heard = self._pool.now()
        if self._call is None:
            self._finished(call)
        elif call.fill():
            self._transport.pause_reading()
        call.tell()

    def connection_lost(self, exc: Exception | None) -> None:
        self._pool._lost(self)
        call, self._call = self._call, None
        if call is None:
            return
        if exc is None and call.status and not self._delimited:
            call.end(None)  # HTTP/1.0 style: the close is the end
        elif self.reused and not self._head:
            call.end(Failure(Fault.STALE, "the kept-alive connection was closed before a reply"))
        else:
            where = "in the middle of its reply" if call.status else "before its reply"
            call.end(Failure(Fault.RESET, f"the connection was lost {where}"))
        call.tell()

    def _garbage(self, call: Call, message: str) -> None:
        self.drop()
        call.end(Failure(Fault.GARBAGE, message))
        call.tell()

    def _finished(self, call: Call) -> None:
        call.end(None)
        if self._spent:
            self._transport.close()
        else:
            self._pool._back(self)

    # --- httptools

    def on_message_begin(self) -> None:
        if self._call is None:
            self._spent = True

    def on_header(self, name: bytes, value: bytes) -> None:
        call = self._call
        if call is None:
            return
        name = name.lower()
        if name in (b"content-length", b"transfer-encoding"):
            self._delimited = True
        call.headers.append((name, value))

    def on_headers_complete(self) -> None:
        call = self._call
        if call is None:
            return
        status = self._parser.get_status_code()
        if status < 200:
            call.headers.clear()  # 100-continue, 103 early hints: the real head follows
            self._delimited = False
        else:
            call.begin(status)
            if status in (204, 304):
                self._delimited = True

    def on_body(self, data: bytes) -> None:
        call = self._call
        if call is not None:
            call.add(data)

    def on_message_complete(self) -> None:
        call = self._call
        if call is None or not call.status:
            return
        self._spent = self._spent or not self._parser.should_keep_alive()
        self._call = None


class Pool:
    """Connections to one worker: the most recently used one first, as many as there are calls."""

    def __init__(self, origin: Origin, *, connect_timeout: float, ssl_context: ssl.SSLContext | None = None) -> None:
        self.origin = origin
        self.opened = 0
        """Connections made since the start."""
        self.heard = 0.0
        """Loop time of the last byte that came, for whatever call."""
        self._connect_timeout = connect_timeout
        self._ssl = (ssl_context or ssl.create_default_context()) if origin.tls else None
        self._idle: list[Connection] = []
        self._all: set[Connection] = set()
        self._connecting: dict[asyncio.Task[None], Call] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self._emptied: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        return f"<Pool {self.origin.authority}, {len(self._all)} open, {len(self._idle)} idle>"

    @property
    def open_connections(self) -> int:
        return len(self._all)

    @property
    def idle_connections(self) -> int:
        return len(self._idle)

    def now(self) -> float:
        assert self._loop is not None
        return self._loop.time()

    def call(self, request: bytes, notify: Callable[[Call], None], *, fresh: bool = False) -> Call:
        """A new call, sent."""
        call = Call(notify)
        self.send(call, request, fresh=fresh)
        return call

    def send(self, call: Call, request: bytes, *, fresh: bool = False) -> None:
        """Send `request` (head and body) on an idle connection, or on a new one (always, if `fresh`). Nothing, if the
        call is over already."""
        if call.done:
            return
        call.request = request
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        idle = self._idle
        while idle and not fresh:
            connection = idle.pop()
            if connection.alive():
                connection.reused = True
                connection.start(call)
                return
        task = self._loop.create_task(self._connect(call))
        self._connecting[task] = call
        task.add_done_callback(self._connecting.pop)

    def discard_idle(self) -> None:
        """Close all idle connections: one of them turned out to be stale."""
        idle, self._idle = self._idle, []
        for connection in idle:
            connection.drop()

    def break_off(self, message: str) -> None:
        """Calls in progress fail, and their connections are closed; new ones are made as before."""
        for connection in list(self._all):
            connection.break_off(Failure(Fault.SILENT, message))

    def reap(self) -> None:
        """Close connections that were idle for too long."""
        if self._loop is None:
            return
        horizon = self._loop.time() - IDLE_SECONDS
        kept = []
        for connection in self._idle:
            if connection.since < horizon:
                connection.drop()
            else:
                kept.append(connection)
        self._idle = kept

    async def close(self) -> None:
        """Close everything; calls in progress fail. Idempotent."""
        self._closed = True
        connecting = dict(self._connecting)
        for task in connecting:
            task.cancel()
        if connecting:
            await asyncio.wait(connecting)
        for call in connecting.values():  # a task that had not even begun told nobody
            self._refused(call, Failure(Fault.REFUSED, "the gateway is closing"))
        for connection in list(self._all):
            connection._transport.abort()
        self._idle.clear()
        if self._all:  # the loop reports the loss of each in its next round
            self._emptied = asyncio.get_running_loop().create_future()
            await self._emptied

    async def _connect(self, call: Call) -> None:
        assert self._loop is not None
        connection = Connection(self, call)
        tls_name = self.origin.host if self._ssl else None
        fault, message = Fault.REFUSED, ""
        try:
            if self._closed:
                raise OSError("the gateway is closing")
            async with asyncio.timeout(self._connect_timeout):
                await self._loop.create_connection(
                    lambda: connection, self.origin.host, self.origin.port, ssl=self._ssl, server_hostname=tls_name
                )
        except TimeoutError:
            fault, message = Fault.SILENT, f"no connection within {self._connect_timeout:g} s"
        except OSError as error:
            message = f"no connection ({os.strerror(error.errno) if error.errno else 'it cannot be reached'})"
        except asyncio.CancelledError:  # only `close` does that
            message = "the gateway is closing"
        if message:
            self._lost(connection)  # the loop closes a half-made one, and says nothing to it
            self._refused(call, Failure(fault, message))

    def _refused(self, call: Call, failure: Failure) -> None:
        if not call.done:
            call.end(failure)
            call.tell()

    def _opened(self, connection: Connection) -> None:
        self.opened += 1
        self._all.add(connection)

    def _lost(self, connection: Connection) -> None:
        self._all.discard(connection)
        with contextlib.suppress(ValueError):
            self._idle.remove(connection)
        if self._emptied is not None and not self._all and not self._emptied.done():
            self._emptied.set_result(None)

    def _back(self, connection: Connection) -> None:
        if self._closed or not connection.alive():
            connection.drop()
            return
        connection.since = self.now()
        self._idle.append(connection)
