"""A server with a small application, and clients of bare bytes."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

from baton.gateway.bounds import Bounds, Refusal
from baton.gateway.door import Answer, Inbound
from baton.gateway.listen import bind
from baton.gateway.server import Server
from baton.router.call import Header
from baton.router.legs import ClientGone, Pulse
from tests.router.mocks import run, until

Handler = Callable[[Inbound, Answer, Pulse], Awaitable[None]]


async def echo(inbound: Inbound, answer: Answer, pulse: Pulse) -> None:
    """Path and body."""
    body = inbound.target.encode() + b"|" + inbound.body
    answer.start(200, [(b"x-mine", b"1")], len(body))
    answer.write(body, more=False)


@dataclass
class App:
    """Answers with `handler`; notes what came and who left."""

    handler: Handler = echo
    seen: list[Inbound] = field(default_factory=list)
    gone: int = 0
    ended: int = 0

    async def __call__(self, inbound: Inbound, answer: Answer, pulse: Pulse) -> None:
        self.seen.append(inbound)
        try:
            await self.handler(inbound, answer, pulse)
        except ClientGone:
            self.gone += 1
        finally:
            self.ended += 1

    def unwelcome(self, url: bytes, headers: Sequence[Header]) -> Refusal | None:
        return None

    def refused(self, path: str, status: int, code: str, message: str) -> tuple[list[Header], bytes]:
        return [(b"x-path", path.encode("ascii", "replace"))], f"{code}: {message}".encode()


@dataclass
class Client:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def reply(self, *, head: bool = False) -> tuple[int, dict[bytes, bytes], bytes]:
        """One reply: status, headers, body. Raises `asyncio.IncompleteReadError` if it is cut short."""
        async with asyncio.timeout(5):
            top = await self.reader.readuntil(b"\r\n\r\n")
            status_line, *lines = top[:-4].split(b"\r\n")
            status = int(status_line.split()[1])
            headers = dict(line.split(b": ", 1) for line in lines)
            assert len(headers) == len(lines), "a header occurs twice"
            if head or status in (100, 204, 304):
                return status, headers, b""
            if headers.get(b"transfer-encoding") == b"chunked":
                return status, headers, await self._chunks()
            if b"content-length" in headers:
                return status, headers, await self.reader.readexactly(int(headers[b"content-length"]))
            return status, headers, await self.reader.read()

    async def _chunks(self) -> bytes:
        pieces = []
        while True:
            size = int((await self.reader.readuntil(b"\r\n"))[:-2], 16)
            pieces.append(await self.reader.readexactly(size))
            assert await self.reader.readexactly(2) == b"\r\n"
            if not size:
                return b"".join(pieces)

    async def rest(self) -> bytes:
        """What comes until the server closes. Raises `ConnectionResetError` for a reset."""
        async with asyncio.timeout(5):
            return await self.reader.read()

    def deaf(self) -> None:
        """It reads no more."""
        cast(asyncio.Transport, self.writer.transport).pause_reading()

    def abort(self) -> None:
        self.writer.transport.abort()


@dataclass
class Wire:
    app: App
    server: Server
    port: int
    clients: list[Client] = field(default_factory=list)

    async def connect(self, data: bytes = b"", tls: ssl.SSLContext | None = None) -> Client:
        name = "localhost" if tls is not None else None
        client = Client(*await asyncio.open_connection("127.0.0.1", self.port, ssl=tls, server_hostname=name))
        self.clients.append(client)
        if data:
            client.send(data)
        return client


@contextlib.asynccontextmanager
async def wire(
    handler: Handler = echo, bounds: Bounds | None = None, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Wire]:
    """Afterwards no connection and no task may be left, whatever the clients did."""
    listener = bind("127.0.0.1", 0)
    app = App(handler)
    server = Server(app, bounds or Bounds(sweep=0.005, linger=0.2), tls)
    await server.listen([listener])
    one = Wire(app, server, listener.getsockname()[1])
    try:
        yield one
    finally:
        for client in one.clients:
            client.abort()
        try:
            await until(lambda: server.connections == 0 and app.ended == len(app.seen))
        finally:
            await server.close(0.0)
            listener.close()


def with_wire(
    check: Callable[[Wire], Awaitable[None]],
    handler: Handler = echo,
    bounds: Bounds | None = None,
    tls: ssl.SSLContext | None = None,
) -> None:
    async def main() -> None:
        async with wire(handler, bounds, tls) as one:
            await check(one)

    run(main())


def request(
    path: str = "/x", body: bytes = b"", *headers: str, method: str = "POST", version: str = "1.1", length: bool = True
) -> bytes:
    lines: Sequence[str] = [f"{method} {path} HTTP/{version}", "Host: h", *headers]
    if length:
        lines = [*lines, f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + body
