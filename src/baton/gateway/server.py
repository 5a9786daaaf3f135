"""An HTTP/1.1 server for one application: a protocol per connection, a task per request, and nothing else.

    socket ── Connection (httptools parses) ──▶ Inbound ──▶ application ──▶ HttpAnswer ── bytes ──▶ socket

Every wait for a client has an end: one sweep a second over all connections looks for those that are too slow.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Sequence
from email.utils import formatdate

from baton.gateway.answer import HttpAnswer
from baton.gateway.bounds import Bounds, Refusal
from baton.gateway.connection import Connection
from baton.gateway.door import Application, Inbound
from baton.router.legs import Pulse

log = logging.getLogger("baton.gateway")

TLS_GOODBYE = 2.0
"""Seconds for the other side's part of closing TLS."""
LAST_SECONDS = 5.0
"""For connections and tasks that have been told to end at once."""


class Server:
    """Listens on sockets it is given. `close` ends it: politely for a while, then not."""

    def __init__(self, app: Application, bounds: Bounds, ssl_context: ssl.SSLContext | None = None) -> None:
        self.app = app
        self.bounds = bounds
        self.loop = asyncio.get_running_loop()
        self.date = _date()
        """The header line, as of the last sweep."""
        self.refusals: dict[int, int] = {}
        """By status: answers to what was no request."""
        self._ssl = ssl_context
        self._sockets: list[socket.socket] = []
        self._servers: list[asyncio.AbstractServer] = []
        self._connections: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._sweeper: asyncio.TimerHandle | None = None
        self._empty: asyncio.Future[None] | None = None
        self._stops = 0
        self._stopped = asyncio.Event()
        self._closing = False

    @property
    def connections(self) -> int:
        return len(self._connections)

    async def listen(self, sockets: Sequence[socket.socket]) -> None:
        self._sockets += sockets
        for one in sockets:
            self._servers.append(
                await self.loop.create_server(
                    lambda: Connection(self),
                    sock=one,
                    ssl=self._ssl,
                    ssl_handshake_timeout=self.bounds.head_seconds if self._ssl else None,
                    ssl_shutdown_timeout=TLS_GOODBYE if self._ssl else None,
                )
            )
        self._sweeper = self.loop.call_later(self.bounds.sweep, self._sweep)

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
        self._closing = True
        late = self._last_call()
        for server in self._servers:
            server.close()
        await asyncio.gather(*late, return_exceptions=True)
        for connection in list(self._connections):
            connection.finish()
        if self._connections and self._stops < 2:
            await self._emptied(patience)
        self._abort()
        if self._connections:
            await self._emptied(LAST_SECONDS)
        if self._tasks:
            _, stubborn = await asyncio.wait(self._tasks, timeout=LAST_SECONDS)
            for task in stubborn:
                task.cancel()
        if self._sweeper is not None:
            self._sweeper.cancel()

    def _last_call(self) -> list[asyncio.Task[object]]:
        """Clients that wait in the queue of a socket are reset when it is closed: let them in first."""
        late: list[asyncio.Task[object]] = []
        for listener in self._sockets:
            with contextlib.suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    client.setblocking(False)
                    late.append(self.loop.create_task(self._let_in(client)))
        return late

    async def _let_in(self, client: socket.socket) -> object:
        return await self.loop.connect_accepted_socket(lambda: Connection(self), client, ssl=self._ssl)

    # --- for Connection

    def opened(self, connection: Connection) -> None:
        self._connections.add(connection)
        if self._closing:
            connection.finish()
        elif len(self._connections) > self.bounds.connections:
            connection.refuse(Refusal(503, "overloaded", f"more than {self.bounds.connections} connections"))

    def closed(self, connection: Connection) -> None:
        self._connections.discard(connection)
        if self._empty is not None and not self._connections and not self._empty.done():
            self._empty.set_result(None)

    def start(self, inbound: Inbound, answer: HttpAnswer, pulse: Pulse) -> None:
        pulse.task = task = self.loop.create_task(self._serve(inbound, answer, pulse))
        self._tasks.add(task)

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
            if pulse.task is not None:
                self._tasks.discard(pulse.task)
                pulse.task = None

    def _sweep(self) -> None:
        now, self.date = self.loop.time(), _date()
        for connection in list(self._connections):
            connection.sweep(now)
        self._sweeper = self.loop.call_later(self.bounds.sweep, self._sweep)

    def _abort(self) -> None:
        for connection in list(self._connections):
            connection.drop()

    async def _emptied(self, seconds: float) -> None:
        self._empty = self.loop.create_future()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._empty


def _date() -> bytes:
    return b"date: %b\r\n" % formatdate(usegmt=True).encode("ascii")
