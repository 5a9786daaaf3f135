"""One thread that waits for many sockets, and calls the handler of each that is ready.

Handlers run in the reactor's thread, must not block, and own their sockets: `forget` before `close`.
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Protocol

log = logging.getLogger("baton.transports")

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


class Handler(Protocol):
    def ready(self, events: int) -> None: ...


class Reactor:
    def __init__(self, name: str) -> None:
        self._selector = selectors.DefaultSelector()
        self._calls: deque[Callable[[], None]] = deque()
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._selector.register(self._reader, READ)
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def inside(self) -> bool:
        """Is the caller the reactor's own thread?"""
        return threading.current_thread() is self._thread

    def call(self, function: Callable[[], None]) -> None:
        """Have the reactor's thread call this soon. From any thread; forgotten if the reactor has stopped."""
        self._calls.append(function)
        self._wake()

    def watch(self, file: socket.socket, handler: Handler, events: int = READ) -> None:
        """Call `handler.ready` whenever `file` is ready, or change what it waits for. In the reactor's thread."""
        try:
            self._selector.modify(file, events, handler)
        except KeyError:
            self._selector.register(file, events, handler)

    def forget(self, file: socket.socket) -> None:
        """Stop watching. Idempotent; in the reactor's thread."""
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(file)

    def close(self, last: Callable[[], None] | None = None) -> None:
        """Run what was called before and then `last`, end the thread, wait for it. Idempotent."""
        if self._stopped:
            return
        if last is not None:
            self._calls.append(last)
        self._stopped = True
        self._wake()
        self._thread.join()
        self._selector.close()
        self._reader.close()
        self._writer.close()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # awake already, or gone
            self._writer.send(b"\0")

    def _run(self) -> None:
        while not self._stopped:
            for key, events in self._selector.select():
                if key.data is None:
                    self._drain()
                else:
                    self._guarded(partial(key.data.ready, events))
            self._work_off()
        self._work_off()

    def _drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._reader.recv(4096):
                pass

    def _work_off(self) -> None:
        while self._calls:
            self._guarded(self._calls.popleft())

    def _guarded(self, function: Callable[[], None]) -> None:
        """A mistake in one handler must not silence all the others."""
        try:
            function()
        except Exception:
            log.exception("a socket's handler failed")
