"""A real HTTP server on a free port that answers like an OpenAI server, as told: what the generator is tested on."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Asked:
    path: str
    body: dict[str, Any]
    headers: dict[str, str]


Answer = Callable[["Mock", Asked, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Mock:
    answer: Answer
    url: str = ""
    asked: list[Asked] = field(default_factory=list)
    connections: int = 0
    running: int = 0
    most: int = 0
    """Requests at once, at most."""

    open: list[asyncio.Task[None]] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.connections += 1
        self.open.append(task)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):  # ends here
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in head[1:] if line)}
                data = await reader.readexactly(int(headers.get("content-length", 0)))
                path = head[0].split(" ")[1]
                if path == "/v1/models":
                    plain(writer, 200, {"object": "list", "data": [{"id": "mock", "object": "model"}]})
                    continue
                asked = Asked(path, json.loads(data), headers)
                self.asked.append(asked)
                self.running += 1
                self.most = max(self.most, self.running)
                try:
                    await self.answer(self, asked, writer)
                finally:
                    self.running -= 1
        writer.close()


@contextlib.asynccontextmanager
async def mock_server(answer: Answer) -> AsyncIterator[Mock]:
    mock = Mock(answer)
    server = await asyncio.start_server(mock.serve, "127.0.0.1", 0)
    mock.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield mock
    finally:
        server.close()
        for task in mock.open:
            task.cancel()
        await asyncio.gather(*mock.open, return_exceptions=True)


def plain(writer: asyncio.StreamWriter, status: int, document: Any) -> None:
    body = json.dumps(document).encode()
    writer.write(b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (status, len(body)))
    writer.write(body)


def stream_head(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")


def chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(b"%x\r\n%s\r\n" % (len(data), data))


def event(writer: asyncio.StreamWriter, document: Any) -> None:
    chunk(writer, b"data: " + json.dumps(document).encode() + b"\n\n")


def stream_end(writer: asyncio.StreamWriter) -> None:
    chunk(writer, b"data: [DONE]\n\n")
    writer.write(b"0\r\n\r\n")


def token(words: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": words}]}


def usage(asked: Asked, output: int, cached: int = 0) -> dict[str, Any]:
    prompt = asked.body["prompt"]
    return {
        "choices": [],
        "usage": {
            "prompt_tokens": len(prompt),
            "completion_tokens": output,
            "prompt_tokens_details": {"cached_tokens": cached},
        },
    }


def good(first: float = 0.0, gap: float = 0.0) -> Answer:
    """Streams what was asked: the first token after `first` seconds, the others `gap` seconds apart."""

    async def answer(mock: Mock, asked: Asked, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(first)
        stream_head(writer)
        for index in range(asked.body["max_tokens"]):
            if index:
                await asyncio.sleep(gap)
            event(writer, token(f" w{index}"))
        event(writer, usage(asked, asked.body["max_tokens"]))
        stream_end(writer)
        await writer.drain()

    return answer
