"""Where P and D meet: P listens, D connects once and stays; an end of file is the other one's death, seen at once.

A `Link` is one connection for control messages, in its owner's I/O thread; pages travel elsewhere. A restarted peer
is another connection, and everything that hung on the old one is gone with it.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from baton.base.errors import ConfigError
from baton.base.messages import Codec, CodecError, Message
from baton.disagg.wire import HEADER, MAX_FRAME, MAX_GREETING
from baton.transports.lively import make_lively
from baton.transports.reactor import READ, WRITE, Reactor

log = logging.getLogger("baton.disagg")

CONNECT_TIMEOUT = 5.0
MAX_UNSENT = 64 << 20
MAX_STRANGERS = 64
"""Connections that have not said Hello; one more closes the oldest."""


class Inbox:
    """From I/O threads to the engine's thread."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._events: deque[Any] = deque()
        self._wake = wake

    def post(self, event: Any) -> None:
        self._events.append(event)
        self._wake()

    def take(self) -> list[Any]:
        events = []
        while self._events:
            events.append(self._events.popleft())
        return events


class Link:
    """Framed messages over one socket. `send` and `close` from any thread; `hears` and `ends` are called in the
    reactor's, `ends` exactly once, with the reason."""

    def __init__(
        self,
        connection: socket.socket,
        reactor: Reactor,
        codec: Codec,
        hears: Callable[[Link, Any], None],
        ends: Callable[[Link, str], None],
        sorry: Callable[[str], Message] | None = None,
    ) -> None:
        """`sorry` makes the last words for a peer that we do not understand. Raises `OSError` if it is gone."""
        connection.setblocking(False)
        make_lively(connection)
        self.there = name_of(connection)
        self.greeted = False
        """The first message was good: larger frames are welcome."""
        self._socket = connection
        self._reactor = reactor
        self._codec = codec
        self._hears = hears
        self._ends = ends
        self._sorry = sorry
        self._lock = threading.Lock()
        self._incoming = bytearray()
        self._outgoing = bytearray()
        self._open = True
        reactor.call(self._begin)

    @property
    def open(self) -> bool:
        return self._open

    def send(self, message: Message) -> None:
        """Never blocks; a message to a closed link is dropped (its owner has heard, or will)."""
        payload = self._codec.encode(message)
        frame = len(payload).to_bytes(HEADER, "little") + payload
        with self._lock:
            if not self._open:
                return
            if not self._outgoing:
                frame = frame[self._try_send(frame) :]
            if frame:
                self._outgoing += frame
                self._reactor.call(self._want_write)
            flooded = len(self._outgoing) > MAX_UNSENT
        if flooded:
            self.close("the peer does not read what we send")

    def close(self, reason: str) -> None:
        """What was sent before is flushed as far as the kernel takes it."""
        self._reactor.call(lambda: self._end(reason))

    def ready(self, events: int) -> None:
        if events & WRITE:
            self._flush()
        if events & READ:
            self._read()

    def _begin(self) -> None:
        if self._open:
            self._reactor.watch(self._socket, self)

    def _want_write(self) -> None:
        if self._open:
            self._reactor.watch(self._socket, self, READ | WRITE)

    def _try_send(self, data: bytes | bytearray) -> int:
        try:
            return self._socket.send(data)
        except OSError:  # full, or broken: then reading says so
            return 0

    def _flush(self) -> None:
        with self._lock:
            del self._outgoing[: self._try_send(self._outgoing)]
            idle = not self._outgoing
        if idle and self._open:
            self._reactor.watch(self._socket, self, READ)

    def _read(self) -> None:
        try:
            data = self._socket.recv(1 << 18)
        except BlockingIOError:
            return
        except OSError as error:
            self._end(f"the connection broke: {error}")
            return
        if not data:
            self._end("the peer closed the connection")
            return
        self._incoming += data
        self._parse()

    def _parse(self) -> None:
        start = 0
        while self._open and len(self._incoming) - start >= HEADER:
            size = int.from_bytes(self._incoming[start : start + HEADER], "little")
            if size > (MAX_FRAME if self.greeted else MAX_GREETING):
                self._end(f"the peer sent a frame of {size} bytes: it does not speak our protocol")
                return
            if len(self._incoming) - start - HEADER < size:
                break
            frame = bytes(self._incoming[start + HEADER : start + HEADER + size])
            start += HEADER + size
            try:
                message = self._codec.decode(frame)
            except CodecError as error:
                if self._sorry is not None:
                    self.send(self._sorry(str(error)))
                self._end(str(error))
                return
            self._hears(self, message)
        del self._incoming[:start]

    def _end(self, reason: str) -> None:
        with self._lock:
            if not self._open:
                return
            if self._outgoing:
                self._try_send(self._outgoing)
            self._open = False
            self._reactor.forget(self._socket)
            self._socket.close()
        self._ends(self, reason)

    def __repr__(self) -> str:
        return f"<Link to {self.there}{'' if self._open else ', closed'}>"


class Door:
    """P's listener. A visitor's first message decides whether it may stay."""

    def __init__(self, host: str, port: int, reactor: Reactor, receive: Callable[[socket.socket], Link]) -> None:
        """Raises `ConfigError` if the address is taken or not ours. `receive` makes a link of a connection."""
        self._reactor = reactor
        self._receive = receive
        self._strangers: deque[Link] = deque()
        self._socket = listen(host, port)
        self.port: int = self._socket.getsockname()[1]
        reactor.call(lambda: reactor.watch(self._socket, self))

    def ready(self, events: int) -> None:
        try:
            connection, _ = self._socket.accept()
        except OSError:
            return
        self._strangers = deque(link for link in self._strangers if link.open and not link.greeted)
        if len(self._strangers) >= MAX_STRANGERS:
            self._strangers.popleft().close("it never said Hello")
        try:
            self._strangers.append(self._receive(connection))
        except OSError:  # gone before we looked
            connection.close()

    def close(self) -> None:
        """In the reactor's thread."""
        self._reactor.forget(self._socket)
        self._socket.close()
        for link in self._strangers:
            link.close("the door is closed")


def listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)
        listener.setblocking(False)
    except (OSError, OverflowError) as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host}:{port} (bootstrap-host, disaggregation-bootstrap-port): {error}; "
            "another port, or 0 for any free one, may do"
        ) from error
    return listener


def name_of(connection: socket.socket) -> str:
    try:
        host, port = connection.getpeername()[:2]
    except OSError:
        return "a peer that is gone"
    return f"{host}:{port}"
