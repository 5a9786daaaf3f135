"""A worker that writes down every byte it gets, and reads it as the strictest of servers would."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field
from typing import cast

REQUEST_LINE = re.compile(rb"(GET|POST) (/[!-~]*) HTTP/1\.1")
HEADER_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+): ([\x20-\x7e\x80-\xff]*)")
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"


@dataclass
class Received:
    method: bytes
    target: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes


class _Tapped(asyncio.Protocol):
    def __init__(self, tap: Tap) -> None:
        self.tap = tap
        self.data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.tap.connections.append(self)

    def data_received(self, data: bytes) -> None:
        self.data += data
        while (received := self._read()) is not None:
            if received.target not in (b"/health", b"/server_info", b"/version"):
                self.tap.seen.append(received)
            self.transport.write(self.tap.answer)

    def _read(self) -> Received | None:
        head, end, rest = self.data.partition(b"\r\n\r\n")
        if not end:
            return None
        first, *lines = head.split(b"\r\n")
        top, pairs = REQUEST_LINE.fullmatch(first), [HEADER_LINE.fullmatch(line) for line in lines]
        if top is None or None in pairs:
            self.tap.malformed.append(head)
            self.data = b""
            return None
        headers = [(pair[1].lower(), pair[2]) for pair in pairs if pair is not None]
        names = [name for name, _ in headers]
        lengths = [int(value) for name, value in headers if name == b"content-length"]
        if len(lengths) > 1 or names.count(b"host") != 1 or b"transfer-encoding" in names:
            self.tap.malformed.append(head)
        size = sum(lengths)
        if len(rest) < size:
            return None
        self.data = rest[size:]
        return Received(top[1], top[2], headers, rest[:size])


@dataclass
class Tap:
    """`seen`: requests beside probes; `malformed`: heads that are not well formed."""

    answer: bytes = ANSWER
    seen: list[Received] = field(default_factory=list)
    malformed: list[bytes] = field(default_factory=list)
    connections: list[_Tapped] = field(default_factory=list)
    url: str = ""

    async def __aenter__(self) -> Tap:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Tapped(self), "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for connection in self.connections:
            connection.transport.abort()
        await self._server.wait_closed()

    def leftovers(self) -> list[bytes]:
        """Bytes that belong to no request."""
        return [connection.data for connection in self.connections if connection.data]
