"""From a worker to the client: bytes as they come, cut between events, never parsed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic
from typing import Protocol

from baton.base.errors import BatonError
from baton.gateway import hops
from baton.gateway.door import Answer
from baton.gateway.journal import SEED, Journal
from baton.gateway.replies import DONE, error_event
from baton.gateway.timeline import Timeline
from baton.gateway.timing import server_timing
from baton.gateway.turnstile import completion_tokens
from baton.router.call import Call, Failure, Fault, Header
from baton.router.legs import Legs, Pulse
from baton.router.wheel import Wheel

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
        SEED,
    }
)
"""Headers that belong to one connection, or that the gateway says itself."""
EXPLAIN, ROUTE = b"x-baton-explain", b"x-baton-route"
"""A request with the first (`1`) gets the second."""
Edit = Callable[[bytes], bytes]
USAGE_BYTES = 4096
"""At the end of a reply, where its usage stands."""
ENDED_BY_DONE = frozenset({"/generate", "/v1/completions", "/v1/chat/completions"})
"""Routes whose streams say that they are over; of others only HTTP does."""
ERROR_EVENT = b'data: {"error"'
MAX_EVENT = 1 << 20
"""An unfinished event larger than this is passed on in pieces."""


class Cutter(Protocol):
    """(what can be passed on now, the rest) of what came."""

    def __call__(self, data: bytes) -> tuple[bytes, bytes]: ...


class Relay:
    """One answer on its way to the client."""

    __slots__ = (
        "_answer",
        "_cutter",
        "_edit",
        "_end",
        "_headers",
        "_loop",
        "_path",
        "_tail",
        "_timeline",
        "events",
        "explained",
        "journal",
        "moved",
        "started",
    )

    def __init__(
        self, answer: Answer, path: str, headers: list[Header], timeline: Timeline, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._answer = answer
        self._path = path
        self._headers = headers
        """The gateway's own."""
        self._timeline = timeline
        self._tail = b""
        """The beginning of a piece whose end has not come."""
        self._end = b""
        """The last bytes that were passed on."""
        self._cutter: Cutter | None = None
        self._edit: Edit | None = None
        self._loop = loop
        self.moved = 0.0
        """Loop time when something was passed on last."""
        self.started = False
        self.events = False
        """It is an event stream."""
        self.journal: Journal | None = None
        """Set if the stream can be continued elsewhere."""
        self.explained = False
        """The client wants to know who answered, and why they were chosen."""

    @property
    def output_tokens(self) -> int | None:
        """How many tokens the client got; None if that is not known."""
        return self.journal.count if self.journal is not None else completion_tokens(self._tail)

    def whole(self, call: Call, body: bytes) -> None:
        """A complete reply in one piece."""
        self.started = True
        self._tail = body[-USAGE_BYTES:]
        self._answer.start(call.status, self._reply_headers(call), len(body))
        self._answer.write(body, more=False)

    async def stream(self, legs: Legs, pulse: Pulse, edit: Edit | None = None) -> bool:
        """A reply while it comes in; `edit` may change whole events. True: it is complete; False: the worker failed,
        and the client waits for the rest. Raises `ClientGone`, `TimedOut`."""
        call, answer = legs.answer.call, self._answer
        self._cutter = self._begin(call) if not self.started else self._go_on(call)
        self._edit = edit
        self.moved = self._loop.time()
        legs.relay(self._pass_on)  # pieces go on from where they come in, without waking anybody
        while True:
            over = call.done
            data = self._next(call)
            if over and self._is_whole(call):
                answer.write(data if self._noted else data + self._tail, more=False)
                return True
            if data:
                answer.write(data, more=True)
            if over:
                return False
            if answer.paused:
                legs.hold_back()
                await answer.drained()
                self.moved = self._loop.time()
                legs.relay(self._pass_on)
            else:
                await pulse.wait()

    def _pass_on(self, call: Call) -> bool:
        """A piece that came. False: somebody must see to it that the client keeps up."""
        data = self._next(call)
        if data:
            self._answer.write(data, more=True)
        return not self._answer.paused

    def _next(self, call: Call) -> bytes:
        """What can be passed on."""
        data = call.take()
        if self._cutter is not None:
            data, self._tail = self._cutter(self._tail + data if self._tail else data)
        if data:
            self.moved, self._end = (
                call.last,
                data[-len(DONE) :] if len(data) >= len(DONE) else (self._end + data)[-len(DONE) :],
            )
            if self._edit is not None:
                data = self._edit(data)
        return data

    @property
    def waits_for_client(self) -> bool:
        return self._answer.paused

    def broken(self, error: BatonError) -> None:
        """The rest will not come: say so, in the worker's own words if it had some, or break off."""
        if not self.events:
            self._answer.abort()
        elif self._noted and self._tail.startswith(ERROR_EVENT) and self._tail.endswith(DONE):
            self._answer.write(self._tail, more=False)
        else:
            self._answer.write(error_event(self._path, error), more=False)

    @property
    def _noted(self) -> bool:
        """What the client has is known, and nothing else is passed on."""
        return self.journal is not None and self.journal.kept

    def _is_whole(self, call: Call) -> bool:
        """The worker says no more: has it said all? A stream that says its own end needs no other, and one that does
        not has none, whatever HTTP thinks."""
        if not self.events or self._path not in ENDED_BY_DONE:
            return call.complete
        end = self._end if self._noted else self._end + self._tail
        return end.rstrip().endswith(DONE.rstrip())

    def _begin(self, call: Call) -> Cutter | None:
        self.started, self._timeline.first = True, monotonic()
        self.events = call.events
        self._answer.start(call.status, self._reply_headers(call))
        seed = call.header(SEED)
        if seed is not None and self.events:
            self.journal = Journal(seed)
            return self.journal.pieces
        return cut if self.events else None

    def _go_on(self, call: Call) -> Cutter | None:
        """The answer of another worker, from where the last one stopped."""
        self._tail = b""
        return self.journal.pieces if self.journal is not None else cut

    def _reply_headers(self, call: Call) -> list[Header]:
        dropped = hops.dropped(DROPPED, call.headers)
        headers = [header for header in call.headers if header[0] not in dropped]
        headers += self._headers
        headers += server_timing(self._timeline)
        if self.explained:
            headers.append(_route(self._timeline))
        return headers


def _route(timeline: Timeline) -> Header:
    """Who was chosen, without their addresses, and why."""
    target = timeline.attempts[-1].target
    names = [target.answering.name] if target.prefill is None else [target.prefill.name, target.answering.name]
    again = f"; attempt {len(timeline.attempts)}" if len(timeline.attempts) > 1 else ""
    return ROUTE, f"{' '.join(names)}; {target.reason}{again}".encode("ascii", "replace")


class Stall:
    """Gives up a worker from which nothing comes for too long in the middle of its answer, or nothing that could be
    passed on: one timer, moved only when it fires."""

    __slots__ = ("_call", "_pulse", "_relay", "_seconds", "_timer", "_wheel")

    def __init__(self, legs: Legs, relay: Relay, pulse: Pulse, wheel: Wheel, seconds: float) -> None:
        self._call, self._relay, self._pulse, self._wheel = legs.answer.call, relay, pulse, wheel
        self._seconds = seconds
        self._timer = wheel.call_later(seconds, self._look)

    def cancel(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        due = self._relay.moved + self._seconds
        if self._relay.waits_for_client or due > self._wheel.loop.time():
            self._timer = self._wheel.call_at(max(due, self._wheel.loop.time() + 0.05), self._look)
        else:
            message = f"it sent nothing for {self._seconds:g} s in the middle of its answer"
            self._call.fail(Failure(Fault.LATE, message))
            self._pulse.ring()


def cut(data: bytes) -> tuple[bytes, bytes]:
    """Whole events, and the beginning of the next one."""
    if data.endswith((b"\n\n", b"\r\n\r\n")) or len(data) > MAX_EVENT:
        return data, b""
    ends = [at + len(mark) for mark in (b"\n\n", b"\n\r\n") if (at := data.rfind(mark)) >= 0]
    end = max(ends, default=0)
    return data[:end], data[end:]
