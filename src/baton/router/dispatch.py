"""How a request is sent: one attempt is one or two calls with one joint life.

    Dialect.send(target, parcel, ...) ──▶ Legs: `answer` (the client reads it) and, in a pair, `receipt` (the prefill's)

* both legs of a pair leave at the same moment, with the same fresh room;
* the first failure is the attempt's failure (`Legs.lost`) and closes the other leg at once, unless the answer has
  begun: then the prefill has done its work, and the decode worker speaks for itself;
* when the answer is complete, the receipt drains in the background, for `DRAIN_SECONDS` at most.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Protocol

from baton.base.errors import BatonError, TimedOut
from baton.router import splice
from baton.router.registry import Registry, Role, Worker
from baton.router.splice import Body
from baton.router.upstream import Call, Failure, Fault

DRAIN_SECONDS = 10.0
MAX_ROOM = 2**63
RECEIPT_ERRORS = (b'data: {"error"', b'{"error"')
ABORTED = (b'"finish_reason":{"type":"abort"', b'"finish_reason": {"type": "abort"')

SICK = frozenset({500, 501, 504, 505})
"""Statuses that count against a worker. 502 and 503 do not: they speak of its peers and of its load."""


@dataclass(frozen=True, slots=True)
class Target:
    """Who serves an attempt: a pair, or one worker that does everything (`prefill` None)."""

    answering: Worker
    prefill: Worker | None = None

    @property
    def dialect(self) -> str:
        return "regular" if self.prefill is None else "native"


@dataclass(frozen=True, slots=True)
class Parcel:
    """What is sent, whoever gets it."""

    path: str
    """With the query."""
    headers: bytes
    """Header lines to pass on, each with its CR LF."""
    body: Body


class Pulse:
    """Wakes the one coroutine that looks after a request, whatever happened in its life."""

    __slots__ = ("_loop", "_rung", "_waiter", "expired", "gone")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiter: asyncio.Future[None] | None = None
        self._rung = False
        self.gone = False
        """The client has left."""
        self.expired = ""
        """Which deadline has passed."""

    def ring(self) -> None:
        self._rung = True
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def leave(self) -> None:
        self.gone = True
        self.ring()

    def expire(self, what: str) -> None:
        self.expired = self.expired or what
        self.ring()

    async def wait(self) -> None:
        """Until the next news, or at once if there was some since the last wait. Raises `ClientGone` or `TimedOut`."""
        if not self._rung:
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._rung = False
        if self.gone:
            raise ClientGone
        if self.expired:
            raise TimedOut(self.expired)


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Leg:
    """One call, and what must be given back when it ends."""

    __slots__ = ("_registry", "_settled", "_tokens", "call", "role", "worker")

    def __init__(self, role: Role, worker: Worker, tokens: int, registry: Registry, now: float) -> None:
        self.role: Role = role
        self.worker = worker
        self.call: Call
        self._registry = registry
        self._tokens = tokens
        self._settled = False
        registry.charge(worker, tokens, now)

    def __repr__(self) -> str:
        return f"<Leg {self.role} {self.worker.url} {self.call!r}>"

    def settle(self, now: float) -> None:
        """Give the load back and tell the registry how it went. Once, when the call is done."""
        if self._settled:
            return
        self._settled = True
        self._registry.discharge(self.worker, self._tokens)
        fault, status = self.fault, self.call.status
        if fault is Fault.STALE:
            self.worker.pool.discard_idle()
            self._registry.doubted(self.worker)
        elif fault is not None and fault is not Fault.CANCELLED:
            self._registry.failed(self.worker, fault.value, now)
        elif fault is None and status in SICK:
            self._registry.failed(self.worker, "status_5xx", now)
        elif fault is None:
            self._registry.succeeded(self.worker, now)

    @property
    def fault(self) -> Fault | None:
        return self.call.failure.fault if self.call.failure is not None else None


class Legs:
    """The calls of one attempt. Whoever made it reads `answer`, and at the end calls `cancel` in any case."""

    def __init__(self, pulse: Pulse, loop: asyncio.AbstractEventLoop, answer: Leg, receipt: Leg | None) -> None:
        self.answer = answer
        self.receipt = receipt
        self.lost: Leg | None = None
        """The leg that failed first, before the answer began."""
        self.eager = False
        """Somebody reads both: ring at every piece of the answer, and when the receipt is full or over."""
        self.relaying = False
        """The client has seen a part of the answer: too late to lose the attempt."""
        self._pulse = pulse
        self._loop = loop
        self._drain: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<Legs {self.answer!r} {self.receipt!r} lost={self.lost!r}>"

    @property
    def begun(self) -> bool:
        """The answer has begun: there is something to relay."""
        call = self.answer.call
        return call.status != 0 and call.status < 400 and (call.received > 0 or call.complete)

    def on_answer(self, call: Call) -> None:
        done = call.done
        if (call.failure is not None and not self.relaying) or call.status >= 400:
            self._lose(self.answer)
        if done:
            self.answer.settle(self._loop.time())
            if call.complete and self.receipt is not None and not self.receipt.call.done and self._drain is None:
                self._drain = self._loop.call_later(DRAIN_SECONDS, self._stop_receipt)
        if done or self.eager or call.paused or call.status >= 400 or self._streams(call):
            self._pulse.ring()

    def on_receipt(self, call: Call) -> None:
        receipt = self.receipt
        assert receipt is not None
        if not self.begun and (call.failure is not None or call.status >= 400 or _refused(call)):
            self._lose(receipt)
        if call.paused and not self.eager:
            call.take()  # nobody reads it
        if call.done:
            receipt.settle(self._loop.time())
            if self._drain is not None:
                self._drain.cancel()
                self._drain = None
        if (self.eager or self.lost is receipt) and (call.done or call.paused):
            self._pulse.ring()

    def cancel(self) -> None:
        """Close what is not over, except a receipt that drains behind a complete answer. Idempotent."""
        answer = self.answer
        if not answer.call.done:
            answer.call.cancel()
            answer.settle(self._loop.time())
        if not answer.call.complete or self.lost is not None:
            self._stop_receipt()

    async def ready(self) -> None:
        """Until the answer has begun, or the attempt is lost."""
        call = self.answer.call
        while self.lost is None and not (call.done or call.paused or (self.begun and self._streams(call))):
            await self._pulse.wait()

    def _lose(self, leg: Leg) -> None:
        if self.lost is not None:
            return
        self.lost = leg
        other = self.receipt if leg is self.answer else self.answer
        if other is not None and not other.call.done:
            other.call.cancel()
            other.settle(self._loop.time())
        self._pulse.ring()

    def _stop_receipt(self) -> None:
        if self._drain is not None:
            self._drain.cancel()
            self._drain = None
        receipt = self.receipt
        if receipt is not None and not receipt.call.done:
            receipt.call.cancel()
            receipt.settle(self._loop.time())

    @staticmethod
    def _streams(call: Call) -> bool:
        return call.received > 0 and is_event_stream(call)


def is_event_stream(call: Call) -> bool:
    kind = call.header(b"content-type")
    return kind is not None and kind.startswith(b"text/event-stream")


def _refused(receipt: Call) -> bool:
    """A failure that came with status 200: an error event, or a sequence that was aborted."""
    if not receipt.complete or not receipt.chunks:
        return False
    body = receipt.chunks[0] if len(receipt.chunks) == 1 else b"".join(receipt.chunks)
    return body.startswith(RECEIPT_ERRORS) or any(mark in body for mark in ABORTED)


class Dialect(Protocol):
    """How a request is sent to a target. Returns at once; everything else happens in callbacks."""

    def send(self, target: Target, parcel: Parcel, pulse: Pulse) -> Legs: ...


class Regular:
    """One worker does everything."""

    def __init__(self, registry: Registry, loop: asyncio.AbstractEventLoop) -> None:
        self._registry, self._loop = registry, loop

    def send(self, target: Target, parcel: Parcel, pulse: Pulse) -> Legs:
        body, worker = parcel.body, target.answering
        answer = Leg(worker.role, worker, body.prompt_tokens + body.max_tokens, self._registry, self._loop.time())
        legs = Legs(pulse, self._loop, answer, None)
        answer.call = _call(worker, parcel, splice.single(body), legs.on_answer)
        return legs


class Native:
    """Prefill and decode get the request at the same time and meet in a room of their own (as SGLang's workers do)."""

    def __init__(self, registry: Registry, loop: asyncio.AbstractEventLoop, random: Random) -> None:
        self._registry, self._loop, self._random = registry, loop, random

    def send(self, target: Target, parcel: Parcel, pulse: Pulse) -> Legs:
        body, prefill, decode = parcel.body, target.prefill, target.answering
        assert prefill is not None
        to_prefill, to_decode = splice.pair(body, prefill.origin.host, prefill.bootstrap_port, self._rooms(body))
        now = self._loop.time()
        answer = Leg("decode", decode, body.prompt_tokens + body.max_tokens, self._registry, now)
        receipt = Leg("prefill", prefill, body.prompt_tokens, self._registry, now)
        legs = Legs(pulse, self._loop, answer, receipt)
        answer.call = _call(decode, parcel, to_decode, legs.on_answer)
        receipt.call = _call(prefill, parcel, to_prefill, legs.on_receipt)
        return legs

    def _rooms(self, body: Body) -> list[int]:
        """Fresh for every attempt; never 0, which SGLang's workers take for "no room"."""
        return [self._random.randrange(1, MAX_ROOM) for _ in range(body.samples or 1)]


def _call(worker: Worker, parcel: Parcel, body: bytes, notify: Callable[[Call], None]) -> Call:
    head = f"POST {parcel.path} HTTP/1.1\r\nhost: {worker.origin.authority}\r\n".encode("ascii")
    request = b"%b%bcontent-length: %d\r\n\r\n%b" % (head, parcel.headers, len(body), body)
    return worker.pool.call(request, notify)


class LegFailed(BatonError):
    """A worker could not be reached, or broke off: 502, and a new attempt may work."""

    status, code, retryable = 502, "worker_failed", True

    @classmethod
    def of(cls, leg: Leg) -> LegFailed:
        failure = leg.call.failure or Failure(Fault.RESET, "it broke off")
        return cls(f"{leg.role} worker {leg.worker.url}: {failure.message}")
