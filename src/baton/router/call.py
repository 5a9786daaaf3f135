"""One request to one worker, and what has come back so far."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

Header = tuple[bytes, bytes]
"""(lower-case name, value)"""

HIGH_WATER = 1 << 20
"""Bytes a call holds before its connection stops reading."""


class Fault(enum.Enum):
    """Why a call ended without a reply."""

    REFUSED = "refused"
    """No connection: the request was never sent."""
    SILENT = "silent"
    """Nobody answers, and nobody hangs up: no connection in time, or the monitor has had no word for too long."""
    STALE = "stale"
    """A kept-alive connection was closed before the first byte of a reply: most likely it had been idle too long."""
    RESET = "reset"
    """The connection was lost before the reply was complete."""
    GARBAGE = "garbage"
    """What came back is not HTTP."""
    LATE = "late"
    """We gave it up: what we waited for did not come in the time it should have taken."""
    CANCELLED = "cancelled"
    """We closed it."""


@dataclass(frozen=True, slots=True)
class Failure:
    fault: Fault
    message: str


CANCELLED = Failure(Fault.CANCELLED, "cancelled")


class Carrier(Protocol):
    """The connection a call is on."""

    def drop(self) -> None: ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...


def nobody(call: Call) -> None:
    """Nobody wants to know."""


class Call:
    """A call is made, then sent (`Pool.send`), and ends in exactly one of: `complete`, `failure`, or `cancel()`.

    `notify` is called (in the event loop, never from inside `Pool.send`) after every piece of news: head, body bytes,
    end, failure. It is not called after `cancel()` or `fail()`.
    """

    __slots__ = (
        "_carrier",
        "_held",
        "_paused",
        "chunks",
        "complete",
        "events",
        "failure",
        "headers",
        "held",
        "last",
        "notify",
        "received",
        "request",
        "status",
    )

    def __init__(self, notify: Callable[[Call], None] = nobody) -> None:
        self.request = b""
        self.notify = notify
        self.status = 0
        self.events = False
        """The reply is an event stream."""
        self.headers: list[Header] = []
        self.chunks: list[bytes] = []
        self.held = 0
        """Bytes in `chunks`."""
        self.received = 0
        """Body bytes so far, taken or not."""
        self.last = 0.0
        """Loop time of the last byte that came."""
        self.complete = False
        self.failure: Failure | None = None
        self._paused = False
        self._held = False
        self._carrier: Carrier | None = None

    def __repr__(self) -> str:
        state = "complete" if self.complete else self.failure.fault.value if self.failure else "open"
        return f"<Call {self.status} {state}, {self.received} bytes>"

    @property
    def done(self) -> bool:
        return self.complete or self.failure is not None

    @property
    def paused(self) -> bool:
        """`HIGH_WATER` bytes are held; nothing more comes until somebody takes them."""
        return self._paused

    def take(self) -> bytes:
        """The body bytes that came since the last time, b"" if none."""
        chunks = self.chunks
        if not chunks:
            return b""
        data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        chunks.clear()
        self.held = 0
        if self._paused:
            self._paused = False
            self._resume()
        return data

    def unbound(self) -> None:
        """What is held may grow without bound: somebody needs all of it at once."""
        if self._paused:
            self._paused = False
            self.held = -(1 << 62)
            self._resume()

    def hold(self) -> bool:
        """Leave what comes in the socket until `release`. False if there is nothing to hold."""
        if self._carrier is None or self._held or self._paused:
            return False
        self._held = True
        self._carrier.pause()
        return True

    def release(self) -> None:
        if self._held:
            self._held = False
            self._resume()

    def header(self, name: bytes) -> bytes | None:
        for key, value in self.headers:
            if key == name:
                return value
        return None

    def cancel(self) -> None:
        """Close the connection if the reply is not complete. Idempotent."""
        self.fail(CANCELLED)

    def fail(self, failure: Failure) -> None:
        """As `cancel`, for a reason."""
        if self.done:
            return
        self.failure = failure
        if self._carrier is not None:
            self._carrier.drop()

    # --- for Connection and Pool

    def bind(self, carrier: Carrier) -> None:
        self._carrier = carrier

    def tell(self) -> None:
        """There is news. The last of it breaks the circle of call and listener, which would be the collector's work."""
        notify = self.notify
        if self.complete or self.failure is not None:
            self.notify = nobody
        notify(self)

    def begin(self, status: int) -> None:
        """The head is there."""
        self.status = status
        kind = self.header(b"content-type")
        self.events = kind is not None and kind.startswith(b"text/event-stream")

    def add(self, data: bytes) -> None:
        self.chunks.append(data)
        self.held += len(data)
        self.received += len(data)

    def fill(self) -> bool:
        """Too much is held: True if that is news."""
        if self.held < HIGH_WATER or self._paused:
            return False
        self._paused = True
        return True

    def end(self, failure: Failure | None) -> None:
        self._carrier = None
        if self.done:
            return
        if failure is None:
            self.complete = True
        else:
            self.failure = failure

    def spoil(self, failure: Failure) -> None:
        """It is complete, and not what was asked for."""
        self.complete, self.failure = False, failure

    def _resume(self) -> None:
        if self._carrier is not None:
            self._carrier.resume()
