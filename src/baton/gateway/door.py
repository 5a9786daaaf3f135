"""The wall between the server and the gateway: what a request is, and how it is answered.

Behind it nothing knows ASGI. A server protocol of our own would implement `Answer` and make `Inbound`s.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from baton.base.errors import TooLarge
from baton.router.dispatch import ClientGone
from baton.router.upstream import Header

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

SWALLOW_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Inbound:
    """A request whose body has arrived."""

    path: str
    target: str
    """Path and query as they came, for passing on."""
    headers: Sequence[Header]
    body: bytes


class Answer(Protocol):
    """How a request is answered: `start` once, then `write` until one says `more=False`. Both wait while the client
    reads too slowly, and neither fails when it has left."""

    status: int
    """As started; 0 before."""

    async def start(self, status: int, headers: list[Header]) -> None: ...

    async def write(self, data: bytes, *, more: bool) -> None: ...

    def abort(self) -> None:
        """Give up in the middle: the client must not take what it has for the whole."""
        ...


class AsgiAnswer:
    """An `Answer` through an ASGI server."""

    __slots__ = ("_send", "status")

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = 0

    async def start(self, status: int, headers: list[Header]) -> None:
        self.status = status
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def write(self, data: bytes, *, more: bool) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    def abort(self) -> None:
        """Nothing to do: an ASGI server closes the connection of an answer that its application leaves unfinished."""


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """The whole body. Raises `TooLarge`, or `ClientGone` if the client left before it was through."""
    for name, value in scope["headers"]:
        if name == b"content-length" and int(value) > limit:
            raise _too_large(limit)
    message = await receive()
    body: bytes = message.get("body", b"")
    if not message.get("more_body", False) and message["type"] == "http.request":
        if len(body) > limit:
            raise _too_large(limit)
        return body
    parts, size = [body], len(body)
    while True:
        if message["type"] == "http.disconnect":
            raise ClientGone
        if size > limit:
            raise _too_large(limit)
        if not message.get("more_body", False):
            return b"".join(parts)
        message = await receive()
        parts.append(message.get("body", b""))
        size += len(parts[-1])


def again(body: bytes, receive: Receive) -> Receive:
    """For an application that reads the body itself: it gets the one that was read, then what comes after it."""
    unread = [body]

    async def replay() -> MutableMapping[str, Any]:
        if unread:
            return {"type": "http.request", "body": unread.pop(), "more_body": False}
        return await receive()

    return replay


async def swallow(receive: Receive, limit: int) -> None:
    """Read on for a moment and forget it: a connection that is closed while its client still writes would be reset,
    and the client would never see why."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(SWALLOW_SECONDS):
            size, more = 0, True
            while more and size < limit:
                message = await receive()
                size += len(message.get("body", b""))
                more = message.get("more_body", False)


async def watch(receive: Receive, gone: Callable[[], None]) -> None:
    """Waits for the client to leave; a task of its own beside the answer."""
    while (await receive())["type"] != "http.disconnect":
        pass
    gone()


def target_of(scope: Scope) -> str:
    """Path and query as the client wrote them."""
    path: bytes = scope.get("raw_path") or scope["path"].encode()
    query: bytes = scope["query_string"]
    return (path + b"?" + query if query else path).decode("ascii")


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"the request body is larger than {limit} bytes, which is what this gateway takes")


def spawn_watch(loop: asyncio.AbstractEventLoop, receive: Receive, gone: Callable[[], None]) -> asyncio.Task[None]:
    return loop.create_task(watch(receive, gone))
