"""From a worker to the client: bytes as they come, cut between events, never parsed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from baton.base.errors import BatonError
from baton.gateway.door import Answer
from baton.gateway.replies import error_event
from baton.router.dispatch import LegFailed, Legs, Pulse, is_event_stream
from baton.router.upstream import Call, Header

DROPPED = frozenset(
    {
        b"connection",
        b"content-length",
        b"date",
        b"keep-alive",
        b"proxy-authenticate",
        b"server",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"x-request-id",
    }
)
"""Headers that belong to one connection, or that the gateway says itself."""
Edit = Callable[[bytes], bytes]
MAX_EVENT = 1 << 20
"""An unfinished event larger than this is passed on in pieces."""


@dataclass(slots=True)
class Relay:
    """One answer on its way; `first` is when a stream began (perf_counter)."""

    answer: Answer
    path: str
    headers: list[Header]
    """The gateway's own."""
    stall_timeout: float
    first: float = 0.0

    async def whole(self, call: Call, body: bytes) -> None:
        """A complete reply in one piece."""
        headers = self._headers(call)
        headers.append((b"content-length", b"%d" % len(body)))
        await self.answer.start(call.status, headers)
        await self.answer.write(body, more=False)

    async def stream(self, legs: Legs, pulse: Pulse, edit: Edit | None = None) -> BatonError | None:
        """A reply while it comes in; `edit` may change whole events. Raises `ClientGone`; an error after the start is
        told to the client (in an event, or by breaking off) and returned."""
        call, answer = legs.answer.call, self.answer
        events = is_event_stream(call)
        loop = asyncio.get_running_loop()
        legs.relaying = legs.eager = True
        self.first = time.perf_counter()
        await answer.start(call.status, self._headers(call))
        stall = Stall(call, pulse, loop, self.stall_timeout)
        tail = b""
        try:
            while True:
                complete = call.complete
                data = call.take()
                if events:
                    data, tail = cut(tail + data if tail else data)
                    if edit is not None and data:
                        data = edit(data)
                if complete:
                    await answer.write(data + tail, more=False)
                    return None
                if data:
                    await answer.write(data, more=True)
                if call.failure is not None and not call.chunks:
                    return await self._broken(LegFailed.of(legs.answer), events)
                await pulse.wait()
        except BatonError as error:
            return await self._broken(error, events)
        finally:
            stall.cancel()

    async def _broken(self, error: BatonError, events: bool) -> BatonError:
        if events:
            await self.answer.write(error_event(self.path, error), more=False)
        else:
            self.answer.abort()
        return error

    def _headers(self, call: Call) -> list[Header]:
        return [header for header in call.headers if header[0] not in DROPPED] + self.headers


class Stall:
    """Ends a stream from which nothing came for too long: one timer, moved only when it fires."""

    __slots__ = ("_call", "_loop", "_pulse", "_seconds", "_timer")

    def __init__(self, call: Call, pulse: Pulse, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        self._call, self._pulse, self._loop, self._seconds = call, pulse, loop, seconds
        self._timer = loop.call_later(seconds, self._look)

    def cancel(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        due = self._call.last + self._seconds
        if self._call.paused or due > self._loop.time():
            self._timer = self._loop.call_at(max(due, self._loop.time() + 0.05), self._look)
        else:
            self._pulse.expire(f"the worker sent nothing for {self._seconds:g} s in the middle of its answer")


def cut(data: bytes) -> tuple[bytes, bytes]:
    """Whole events, and the beginning of the next one."""
    if data.endswith((b"\n\n", b"\r\n\r\n")) or len(data) > MAX_EVENT:
        return data, b""
    ends = [at + len(mark) for mark in (b"\n\n", b"\n\r\n") if (at := data.rfind(mark)) >= 0]
    end = max(ends, default=0)
    return data[:end], data[end:]
