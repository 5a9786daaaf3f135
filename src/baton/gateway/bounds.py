"""What clients may take of the server, and what it says to those who want more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Refusal(NamedTuple):
    status: int
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Bounds:
    """What clients may take of us. Times in seconds."""

    body: int = 8 << 20
    """Bytes."""
    head: int = 64 << 10
    """Bytes of request line and headers."""
    headers: int = 128
    connections: int = 16384
    keep_alive: float = 75.0
    """How long an idle connection stays open."""
    head_seconds: float = 10.0
    """From the first byte of a head to its end."""
    body_seconds: float = 30.0
    """Between two pieces of a body."""
    body_rate: int = 8 << 10
    """Bytes per second that a body must come with, on the whole."""
    send_seconds: float = 60.0
    """Without the client taking a byte of what waits for it."""
    linger: float = 2.0
    """How long a client that still writes is read on after a refusal: a close with unread bytes would be a reset, and
    it would never see why."""
    parting: float = 1.0
    """How long a connection that shall end is given for a last request, which may be on its way."""
    sweep: float = 1.0
    """How often all these are looked at."""

    def body_too_large(self) -> Refusal:
        message = f"the request body is larger than {self.body} bytes, which is what this gateway takes"
        return Refusal(413, "payload_too_large", message)

    def head_too_large(self) -> Refusal:
        message = f"a request head has at most {self.head} bytes and {self.headers} headers here"
        return Refusal(431, "header_too_large", message)
