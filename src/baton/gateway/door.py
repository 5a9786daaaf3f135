"""The wall between the server and the gateway: what a request is, and how it is answered.

Nothing behind it knows sockets, and nothing before it knows what is served.
"""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from typing import Any, Protocol

import msgspec

from baton.gateway.bounds import Refusal
from baton.router.call import Header
from baton.router.legs import Pulse


class Inbound(msgspec.Struct, frozen=True):
    """A request whose body has arrived."""

    method: str
    path: str
    """Percent-encoded, as it came."""
    query: str
    headers: Sequence[Header]
    body: bytes
    client: str = ""
    """The peer's address."""

    @property
    def target(self) -> str:
        """Path and query, for passing on."""
        return f"{self.path}?{self.query}" if self.query else self.path

    def header(self, name: bytes) -> bytes | None:
        for key, value in self.headers:
            if key == name:
                return value
        return None


class Answer(Protocol):
    """How a request is answered: `start` once, then `write` until one says `more=False`. Neither fails when the client
    has left. Whoever writes much looks at `paused` in between, and waits for `drained`."""

    status: int
    """As started; 0 before."""

    @property
    def paused(self) -> bool:
        """The client reads too slowly."""
        ...

    def start(self, status: int, headers: Sequence[Header], length: int | None = None) -> None:
        """`length`: of the whole body in bytes; None: not known yet."""
        ...

    def write(self, data: bytes, *, more: bool) -> None: ...

    async def drained(self) -> None:
        """Until the client has read enough, or is gone."""
        ...

    def abort(self) -> None:
        """Give up in the middle: the client must not take what it has for the whole."""
        ...


class Application(Protocol):
    """What a server serves. The coroutine ends when the request has been answered, or when its client has left."""

    def __call__(self, inbound: Inbound, answer: Answer, pulse: Pulse) -> Coroutine[Any, Any, None]: ...

    def unwelcome(self, url: bytes, headers: Sequence[Header]) -> Refusal | None:
        """Why a request with a large body is not even read; None if it may come."""
        ...

    def refused(self, path: str, status: int, code: str, message: str) -> tuple[list[Header], bytes]:
        """Headers and body of an answer to what is no request at all."""
        ...
