"""A bridge to ASGI applications, for the routes where a framework is worth its cost."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import unquote

from baton.gateway.door import Answer, Inbound
from baton.router.legs import ClientGone, Pulse

Message = MutableMapping[str, Any]
App = Callable[[Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]


async def serve(app: App, inbound: Inbound, answer: Answer, pulse: Pulse) -> None:
    """Answer one request, whose body is there. An application that waits for more hears when the client has left."""
    unread = [inbound.body]
    framing: list[int | None] = []

    async def receive() -> Message:
        if unread:
            return {"type": "http.request", "body": unread.pop(), "more_body": False}
        while True:
            try:
                await pulse.wait()
            except ClientGone:
                return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [(bytes(name).lower(), bytes(value)) for name, value in message.get("headers", ())]
            lengths = [int(value) for name, value in headers if name == b"content-length"]
            framing.append(lengths[0] if lengths else None)
            answer.start(message["status"], [h for h in headers if h[0] != b"content-length"], framing[0])
        elif message["type"] == "http.response.body":
            answer.write(message.get("body", b""), more=message.get("more_body", False))
            if answer.paused:
                await answer.drained()

    await app(_scope(inbound), receive, send)


def _scope(inbound: Inbound) -> Message:
    """Without `host`: a framework that makes URLs of it would fail at odd ones, and lead clients where these point."""
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": inbound.method,
        "scheme": "http",
        "path": unquote(inbound.path),
        "raw_path": inbound.path.encode("ascii"),
        "query_string": inbound.query.encode("ascii"),
        "root_path": "",
        "headers": [header for header in inbound.headers if header[0] != b"host"],
        "client": (inbound.client, 0),
        "server": None,
    }
