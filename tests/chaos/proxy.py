"""A proxy before one worker that does harm on purpose: to single answers, or to every connection at once.

Requests are read whole, replies pass as bytes. A gateway has one request at a time on a connection, so whatever comes
from the worker belongs to the last request.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import random
import re
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
DRIP_SECONDS = 0.05
DELAY_SECONDS = 0.3
LATEST_HARM = 3000
"""Harm begins at a random byte of a body before this one."""
SHORT = 10
"""Bytes by which a wrong content-length is wrong."""
FAILED = b'{"error": {"message": "harm was done", "type": "server_error", "param": null, "code": "harm"}}'
PAGE = b"<html><body>It works!</body></html>"


class Harm(enum.Enum):
    """What happens to one answer."""

    RESET = "reset before the reply"
    ERROR = "status 500"
    BUSY = "status 503"
    GARBAGE = "garbage"
    PAGE = "200 and an HTML page"
    MUTE = "accepted, never answered"
    DELAY = "delayed"
    DRIP = "slow loris"
    RESET_WITHIN = "reset in the middle"
    STOP_WITHIN = "stops in the middle"
    TRUNCATED = "truncated"
    CUT_CLEAN = "cut, with a proper end"
    TOO_LONG = "content-length too large"
    TOO_SHORT = "content-length too small"


def _reply(status: int, kind: str, body: bytes) -> bytes:
    return f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


UNANSWERED = {
    Harm.ERROR: _reply(500, "application/json", FAILED),
    Harm.BUSY: _reply(503, "application/json", FAILED),
    Harm.GARBAGE: b"\x00\xff\x00 250 ok, this is no HTTP\r\n\r\n",
    Harm.PAGE: _reply(200, "text/html", PAGE),
    Harm.RESET: b"",
    Harm.MUTE: b"",
}
"""Harm that the worker hears nothing of: the request never reaches it."""

Chooser = Callable[[], Harm | None]


def sometimes(harms: Sequence[Harm], chance: float, seed: int) -> Chooser:
    dice = random.Random(seed)
    return lambda: dice.choice(harms) if dice.random() < chance else None


def _no_harm() -> Harm | None:
    return None


@dataclass(slots=True)
class _Fate:
    """Of the answer that is on its way."""

    harm: Harm | None = None
    left: int = 0
    """Body bytes that pass before the harm."""
    head: bytes = b""
    """Of the reply, until it is complete."""
    in_body: bool = False


class Proxy:
    """Listens on a port of its own while the `async with` block runs."""

    def __init__(self, host: str, port: int, seed: int) -> None:
        self.target = (host, port)
        self._random = random.Random(seed)
        self._links: set[Link] = set()
        self._server: asyncio.Server | None = None
        self._whole = asyncio.Event()
        self._whole.set()
        self.choose: Chooser = _no_harm
        """Asked for every POST; checks of health pass."""
        self.port = 0
        self.done: dict[Harm, int] = {}
        """How often which harm was done."""

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for link in list(self._links):
            link.cut()
        while self._links:
            await asyncio.sleep(0.005)
        await self._server.wait_closed()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def part(self) -> None:
        """The network is split: connections stand, new ones are accepted, not a byte passes."""
        self._whole.clear()

    def join(self) -> None:
        """The network is whole again; old connections are reset, as they are after a long while."""
        for link in list(self._links):
            link.cut()
        self._whole.set()

    @property
    def parted(self) -> bool:
        return not self._whole.is_set()

    async def passable(self) -> None:
        await self._whole.wait()

    def fate(self) -> _Fate:
        harm = self.choose()
        if harm is not None:
            self.done[harm] = self.done.get(harm, 0) + 1
        return _Fate(harm, self._random.randrange(LATEST_HARM))

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = Link(self, reader, writer, self.target)
        self._links.add(link)
        try:
            await link.run()
        finally:
            self._links.discard(link)


class Link:
    """A connection of the gateway, and its other half to the worker."""

    def __init__(
        self, proxy: Proxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, target: tuple[str, int]
    ) -> None:
        self._proxy, self._reader, self._writer, self._target = proxy, reader, writer, target
        self._fate = _Fate()
        self._task = asyncio.current_task()
        self._cut = False

    def cut(self) -> None:
        self._cut = True
        if self._task is not None:
            self._task.cancel()

    async def run(self) -> None:
        with contextlib.suppress(OSError, EOFError, asyncio.CancelledError):
            await self._proxy.passable()
            from_worker, to_worker = await asyncio.open_connection(*self._target)
            try:
                await self._both(from_worker, to_worker)
            finally:
                _reset(to_worker)
        if not self._writer.is_closing():
            _reset(self._writer)

    async def _both(self, from_worker: asyncio.StreamReader, to_worker: asyncio.StreamWriter) -> None:
        """Until either side ends."""
        halves = {asyncio.create_task(self._requests(to_worker)), asyncio.create_task(self._replies(from_worker))}
        try:
            await asyncio.wait(halves, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for half in halves:
                half.cancel()
            await asyncio.gather(*halves, return_exceptions=True)

    async def _requests(self, to_worker: asyncio.StreamWriter) -> None:
        while True:
            head = await self._reader.readuntil(b"\r\n\r\n")
            length = LENGTH.search(head)
            body = await self._reader.readexactly(int(length[1])) if length else b""
            self._fate = fate = self._proxy.fate() if head.startswith(b"POST") else _Fate()
            await self._proxy.passable()
            if fate.harm in UNANSWERED:
                await self._answer(fate.harm)
                return
            to_worker.write(head + body)
            await to_worker.drain()

    async def _answer(self, harm: Harm) -> None:
        if harm is Harm.MUTE:
            await self._reader.read()  # until the gateway has had enough
        elif harm is not Harm.RESET:
            self._writer.write(UNANSWERED[harm])
            await self._writer.drain()
            self._writer.close()

    async def _replies(self, from_worker: asyncio.StreamReader) -> None:
        while data := await from_worker.read(1 << 16):
            await self._proxy.passable()
            if not await self._pass(data):
                return

    async def _pass(self, data: bytes) -> bool:
        """False: this connection is over."""
        fate = self._fate
        match fate.harm:
            case None:
                self._writer.write(data)
            case Harm.DELAY:
                fate.harm = None
                await asyncio.sleep(DELAY_SECONDS)
                self._writer.write(data)
            case Harm.DRIP:
                for byte in data:
                    self._writer.write(bytes((byte,)))
                    await self._writer.drain()
                    await asyncio.sleep(DRIP_SECONDS)
            case Harm.TOO_LONG | Harm.TOO_SHORT:
                return self._wrong_length(fate, data)
            case _:
                return await self._harm_within(fate, data)
        await self._writer.drain()
        return True

    def _body(self, fate: _Fate, data: bytes) -> tuple[bytes, bytes]:
        """(the head if it ends here, what belongs to the body)"""
        if fate.in_body:
            return b"", data
        fate.head += data
        head, end, body = fate.head.partition(b"\r\n\r\n")
        if not end:
            return b"", b""
        fate.in_body = True
        return head + end, body

    async def _harm_within(self, fate: _Fate, data: bytes) -> bool:
        """The body is cut somewhere."""
        head, body = self._body(fate, data)
        self._writer.write(head)
        if not fate.in_body or len(body) <= fate.left:
            ends = body.endswith(b"0\r\n\r\n") or (head and b"content-length" in head.lower())
            if not (ends and fate.in_body):
                fate.left -= len(body)
                self._writer.write(body)
                await self._writer.drain()
                return True
            fate.left = self._half(body)  # the last chance
        shown = body[: fate.left]
        if fate.harm is Harm.CUT_CLEAN and b"chunked" in fate.head.lower():
            shown = shown[: shown.rfind(b"\n\n\r\n") + 4] if b"\n\n\r\n" in shown else b""
            shown += b"0\r\n\r\n"
        self._writer.write(shown)
        await self._writer.drain()
        if fate.harm is Harm.STOP_WITHIN:
            await asyncio.Event().wait()
        elif fate.harm is Harm.RESET_WITHIN:
            _reset(self._writer)
        else:
            self._writer.close()
        return False

    def _half(self, body: bytes) -> int:
        return len(body) // 2

    def _wrong_length(self, fate: _Fate, data: bytes) -> bool:
        """A reply with a length says a wrong one; of a chunked one, the last chunk's head lies."""
        head, body = self._body(fate, data)
        by = SHORT if fate.harm is Harm.TOO_LONG else -SHORT
        if head:
            length = LENGTH.search(head)
            if length is not None:
                head = head[: length.start(1)] + b"%d" % max(0, int(length[1]) + by) + head[length.end(1) :]
                self._writer.write(head + body)
                self._writer.close()
                return False
        self._writer.write(head)
        if body.endswith(b"0\r\n\r\n") or b"\r\n0\r\n" in body:
            size, mark, rest = body.partition(b"\r\n")
            with contextlib.suppress(ValueError):
                body = b"%x" % max(1, int(size, 16) + by) + mark + rest
            self._writer.write(body)
            self._writer.close()
            return False
        self._writer.write(body)
        return True


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close at once, with RST."""
    sock = writer.get_extra_info("socket")
    with contextlib.suppress(OSError, AttributeError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
