"""The one channel between a front and its engine: a Unix stream socket with length-prefixed messages.

The front listens, the engine connects; the other side's death is an end of file, seen at once. The engine's side is
blocking with a selector (its loop is a plain thread), the front's side is asyncio.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import selectors
import socket
from collections.abc import Callable, Iterable
from typing import cast

from baton.base.messages import Codec, CodecError, Message, ToEngine, ToFront

log = logging.getLogger("baton.channel")

HEADER = 4
MAX_MESSAGE = 256 * 2**20


class ChannelClosed(Exception):
    """The other side is gone."""


def _frame(payload: bytes) -> bytes:
    return len(payload).to_bytes(HEADER, "little") + payload


class Waker:
    """Lets any thread interrupt the engine's wait."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    def fileno(self) -> int:
        return self._reader.fileno()

    def wake(self) -> None:
        with contextlib.suppress(OSError):  # already awake, or closed
            self._writer.send(b"\0")

    def clear(self) -> None:
        try:
            while self._reader.recv(4096):
                pass
        except BlockingIOError:
            pass

    def close(self) -> None:
        self._reader.close()
        self._writer.close()


class EngineEnd:
    """The engine's end. `receive` waits for messages or the waker; `send` never blocks the loop."""

    def __init__(self, connection: socket.socket, waker: Waker) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._waker = waker
        self._codec = Codec(ToEngine)
        self._incoming = bytearray()
        self._outgoing = bytearray()
        self._selector = selectors.DefaultSelector()
        self._selector.register(connection, selectors.EVENT_READ)
        self._selector.register(waker, selectors.EVENT_READ)

    @classmethod
    def connect(cls, path: str, waker: Waker) -> EngineEnd:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(path)
        return cls(connection, waker)

    def receive(self, timeout: float | None) -> list[ToEngine]:
        """Messages that are there; waits up to `timeout` seconds (0: not at all, None: for ever) for the first one
        or a wake-up. Raises `ChannelClosed`."""
        for key, events in self._selector.select(timeout):
            if key.fileobj is self._waker:
                self._waker.clear()
                continue
            if events & selectors.EVENT_WRITE:
                self._flush()
            if events & selectors.EVENT_READ:
                self._read()
        return self._parse()

    def send(self, messages: Iterable[Message]) -> None:
        """Queue and send what the socket takes now; the rest follows from `receive`. Raises `ChannelClosed`."""
        for message in messages:
            self._outgoing += _frame(self._codec.encode(message))
        if self._outgoing:
            self._flush()

    def close(self) -> None:
        self._selector.close()
        self._socket.close()

    def _read(self) -> None:
        try:
            data = self._socket.recv(1 << 20)
        except BlockingIOError:
            return
        except OSError as error:
            raise ChannelClosed from error
        if not data:
            raise ChannelClosed
        self._incoming += data

    def _parse(self) -> list[ToEngine]:
        messages: list[ToEngine] = []
        buffer, start = self._incoming, 0
        while len(buffer) - start >= HEADER:
            size = int.from_bytes(buffer[start : start + HEADER], "little")
            if len(buffer) - start - HEADER < size:
                break
            messages.append(self._codec.decode(bytes(buffer[start + HEADER : start + HEADER + size])))
            start += HEADER + size
        del buffer[:start]
        return messages

    def _flush(self) -> None:
        try:
            sent = self._socket.send(self._outgoing)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise ChannelClosed from error
        del self._outgoing[:sent]
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._outgoing else 0)
        self._selector.modify(self._socket, wanted)


class FrontEnd(asyncio.Protocol):
    """The front's end of one connection to an engine. Messages are handed to `on_message` as they arrive, without a
    task in between: this is the path of every token. `on_closed` is called once, when the engine is gone."""

    def __init__(self, on_message: Callable[[FrontEnd, ToFront], None], on_closed: Callable[[FrontEnd], None]) -> None:
        self._on_message = on_message
        self._on_closed = on_closed
        self._codec = Codec(ToFront)
        self._incoming = bytearray()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        if peer_uid(transport.get_extra_info("socket")) != os.getuid():
            log.error("somebody else's process wants to be our engine; refused")
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        buffer = self._incoming
        buffer += data
        start = 0
        while len(buffer) - start >= HEADER:
            size = int.from_bytes(buffer[start : start + HEADER], "little")
            end = start + HEADER + size
            if size > MAX_MESSAGE:
                return self._refuse(f"a message of {size} bytes")
            if len(buffer) < end:
                break
            try:
                message = self._codec.decode(buffer[start + HEADER : end])
            except CodecError as error:
                return self._refuse(str(error))
            self._on_message(self, message)
            start = end
        del buffer[:start]
        return None

    def connection_lost(self, error: Exception | None) -> None:
        self._on_closed(self)

    def send(self, message: Message) -> None:
        """Queue a message (the engine reads at every step; the kernel and asyncio buffer meanwhile)."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(_frame(self._codec.encode(message)))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def _refuse(self, reason: str) -> None:
        log.error("the engine's channel is broken, closing it: %s", reason)
        self._incoming.clear()
        if self._transport is not None:
            self._transport.abort()


def peer_uid(connection: socket.socket) -> int:
    """Whose process is at the other end (Linux); ours alone may speak to an engine."""
    option = getattr(socket, "SO_PEERCRED", None)
    if option is None:
        return os.getuid()
    return int.from_bytes(connection.getsockopt(socket.SOL_SOCKET, option, 12)[4:8], "little")
