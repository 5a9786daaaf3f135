"""An answer on its way out: framing, and whether the connection can be kept."""

from __future__ import annotations

import asyncio
import http
from collections.abc import Sequence
from typing import Protocol

from baton.router.call import Header

STATUS_LINES = {s.value: b"HTTP/1.1 %d %b\r\n" % (s.value, s.phrase.encode()) for s in http.HTTPStatus}
STATUS_LINES[499] = b"HTTP/1.1 499 Client Closed Request\r\n"
BODILESS = frozenset({204, 304})


class Line(Protocol):
    """The connection, as an answer needs it."""

    closing: bool
    """After this answer."""
    full: asyncio.Future[None] | None
    """The socket takes no more until this is done."""

    def send(self, data: bytes) -> None: ...

    def drop(self, *, reset: bool = False) -> None:
        """Close without delay; `reset`: so that the other side takes it for no orderly end."""
        ...

    def answered(self, *, keep_alive: bool) -> None: ...


class HttpAnswer:
    """An `Answer` on a connection. The head waits for the first piece of the body, so that both leave together."""

    __slots__ = (
        "_date",
        "_framed",
        "_head",
        "_keep_alive",
        "_line",
        "_silent",
        "_until_close",
        "_version",
        "ended",
        "status",
    )

    def __init__(self, line: Line, version: str, date: bytes, *, keep_alive: bool, head_only: bool) -> None:
        self._line: Line | None = line
        self._version = version
        self._date = date
        self._keep_alive = keep_alive
        self._silent = head_only
        self._framed = False
        """In chunks."""
        self._until_close = False
        """HTTP/1.0: the close is the end."""
        self._head = b""
        self.status = 0
        self.ended = False

    @property
    def paused(self) -> bool:
        return self._line is not None and self._line.full is not None

    async def drained(self) -> None:
        while self._line is not None and self._line.full is not None:
            await asyncio.shield(self._line.full)

    def start(self, status: int, headers: Sequence[Header], length: int | None = None) -> None:
        self.status = status
        if self._line is None:
            return
        keep = self._keep_alive = self._keep_alive and not self._line.closing
        lines = [STATUS_LINES.get(status) or b"HTTP/1.1 %d Unknown\r\n" % status, self._date]
        lines += [b"%b: %b\r\n" % header for header in headers]
        if status in BODILESS:
            self._silent = True
        elif length is not None:
            lines.append(b"content-length: %d\r\n" % length)
        elif self._version == "1.1":
            self._framed = True
            lines.append(b"transfer-encoding: chunked\r\n")
        else:
            self._until_close = True
            keep = self._keep_alive = False
        if not keep:
            lines.append(b"connection: close\r\n")
        elif self._version == "1.0":
            lines.append(b"connection: keep-alive\r\n")
        lines.append(b"\r\n")
        self._head = b"".join(lines)

    def write(self, data: bytes, *, more: bool) -> None:
        line = self._line
        if line is None or self.ended:
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
            line.send(data)
        if not more:
            self.ended = True
            self._line = None
            line.answered(keep_alive=self._keep_alive)

    def abort(self) -> None:
        line, self._line = self._line, None
        if line is not None and not self.ended:
            self.ended = True
            line.drop(reset=self._until_close)

    def left(self) -> None:
        """The client is gone: nothing that is written from now on goes anywhere."""
        self._line = None
