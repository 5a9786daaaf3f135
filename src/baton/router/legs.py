"""The calls of one attempt, with one joint life: the client reads `answer`; the prefill's, in a pair, is the `receipt`.

* The first failure is the attempt's failure (`Legs.lost`) and closes the other leg at once, unless the answer has
  begun: then the prefill has done its work, and the decode worker speaks for itself.
* Once an answer streams, the prefill worker's work is done (its load is given back), and its receipt stays unread in
  its socket for `HOLD_SECONDS`, or until the answer is over: nobody waits for it, and it may come in many pieces.
* When the answer is complete, the receipt drains in the background, for `DRAIN_SECONDS` at most.

How a request is sent, and to whom first, is a dialect's business (`baton.router.dialects`).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable

from baton.base.errors import BatonError, TimedOut
from baton.router.call import Call, Failure, Fault
from baton.router.registry import Registry, Role, Worker
from baton.router.sound import is_sound

DRAIN_SECONDS = 10.0
HOLD_SECONDS = 1.0
EVENT_ERRORS = (b'data: {"error"', b"event: error\n")
RECEIPT_ERRORS = (*EVENT_ERRORS, b'{"error"')
ABORTED = (b'"finish_reason":{"type":"abort"', b'"finish_reason": {"type": "abort"')

_CODE = re.compile(rb'"code"\s*:\s*([45]\d\d)\b')

SICK = frozenset({500, 501, 504, 505})
"""Statuses that count against a worker. 502 and 503 do not: they speak of its peers and of its load."""


class Pulse:
    """Wakes the one coroutine that looks after a request, whatever happened in its life."""

    __slots__ = ("_loop", "_rung", "_waiter", "expired", "gone", "task")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiter: asyncio.Future[None] | None = None
        self._rung = False
        self.gone = False
        """The client has left."""
        self.expired = ""
        """Which deadline has passed."""
        self.task: asyncio.Task[None] | None = None
        """That coroutine's."""

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
        self.check()

    def check(self) -> None:
        """Raises `ClientGone` or `TimedOut`."""
        if self.gone:
            raise ClientGone
        if self.expired:
            raise TimedOut(self.expired)


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Leg:
    """One call, and what must be given back when it ends."""

    __slots__ = ("_charged", "_registry", "_settled", "_tokens", "call", "refused", "role", "worker")

    def __init__(self, role: Role, worker: Worker, tokens: int, registry: Registry, now: float) -> None:
        self.role: Role = role
        self.worker = worker
        self.call = Call()
        self.refused = 0
        """The status inside an error event that came first, in a stream with status 200; 0: there was none."""
        self._registry = registry
        self._tokens = tokens
        self._settled = False
        self._charged = True
        registry.charge(worker, tokens, now)

    def __repr__(self) -> str:
        return f"<Leg {self.role} {self.worker.url} {self.call!r}>"

    def discharge(self) -> None:
        """Give the load back: the worker's work is done. Idempotent."""
        if self._charged:
            self._charged = False
            self._registry.discharge(self.worker, self._tokens)

    def settle(self, now: float) -> None:
        """Give the load back and tell the registry how it went. Once, when the call is done."""
        if self._settled:
            return
        self._settled = True
        self.discharge()
        fault, status = self.fault, self.status
        if fault is Fault.STALE:
            self.worker.pool.discard_idle()
            self._registry.doubted(self.worker)
        elif fault is Fault.LATE:
            self._registry.doubted(self.worker)  # slow, or waiting for its peer: the monitor finds out
        elif fault is not None and fault is not Fault.CANCELLED:
            self._registry.failed(self.worker, fault.value, now)
        elif fault is None and status in SICK:
            self._registry.failed(self.worker, "status_5xx", now)
        elif fault is None:
            self._registry.succeeded(self.worker, now)
            if status == 503:
                self.doubt()

    def doubt(self) -> None:
        """The monitor is to have a look at the worker now."""
        self._registry.doubted(self.worker)

    @property
    def status(self) -> int:
        return self.refused or self.call.status

    @property
    def fault(self) -> Fault | None:
        return self.call.failure.fault if self.call.failure is not None else None


Sink = Callable[[Call], bool]
"""Takes what has come in a call; False: that is all it can take for now."""


class Legs:
    """The calls of one attempt. Whoever made it reads `answer`, and at the end calls `cancel` in any case."""

    __slots__ = ("_loop", "_pulse", "_sink", "_timer", "answer", "eager", "lost", "receipt", "relaying", "strict")

    def __init__(self, pulse: Pulse, loop: asyncio.AbstractEventLoop, answer: Leg, receipt: Leg | None) -> None:
        self.answer = answer
        self.receipt = receipt
        self.lost: Leg | None = None
        """The leg that failed first, before the answer began."""
        self.eager = False
        """Somebody reads both: ring at every piece of the answer, and when the receipt is full or over."""
        self.strict = False
        """Replies are events or JSON; what is neither, or not all of it, is garbage."""
        self.relaying = False
        """The client has seen a part of the answer: too late to lose the attempt."""
        self._sink: Sink | None = None
        self._pulse = pulse
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None
        """What becomes of the receipt next."""

    def __repr__(self) -> str:
        return f"<Legs {self.answer!r} {self.receipt!r} lost={self.lost!r}>"

    @property
    def begun(self) -> bool:
        """The answer has begun: there is something to relay."""
        call = self.answer.call
        return call.status != 0 and call.status < 400 and (call.received > 0 or call.complete)

    def on_answer(self, call: Call) -> None:
        done = call.done
        if self._sink is not None and not done:
            if not self._sink(call):
                self._pulse.ring()
            return
        if not self.relaying:
            self._judge(call)
        if not self.relaying and self.lost is None and _is_error(call):
            self.answer.refused = _code(call.chunks[0])
        if (call.failure is not None and not self.relaying) or self.answer.status >= 400:
            self._lose(self.answer)
        if done:
            self.answer.settle(self._loop.time())
            self._answered(call)
        if done or self.relaying or self.eager or call.paused or self.answer.status >= 400 or self._streams(call):
            self._pulse.ring()

    def on_receipt(self, call: Call) -> None:
        receipt = self.receipt
        assert receipt is not None
        self._judge(call)
        if not self.begun and (call.failure is not None or call.status >= 400 or _refused(call)):
            self._lose(receipt)
        if call.paused and not self.eager:
            call.take()  # nobody reads it
        if call.done:
            receipt.settle(self._loop.time())
            self._stop_timer()
        if (self.eager or self.lost is receipt) and (call.done or call.paused):
            self._pulse.ring()

    async def ready(self) -> None:
        """Until there is something to relay, or the attempt is lost. A plain answer is held until it is whole: it can
        be tried again so long."""
        call = self.answer.call
        while self.lost is None and not (call.done or call.paused or (self.begun and self._streams(call))):
            await self._pulse.wait()

    def hold_back(self) -> None:
        """Nothing more is passed on for now."""
        self._sink = None

    def relay(self, sink: Sink) -> None:
        """The answer goes out to the client from now on, piece by piece through `sink`."""
        self._sink = sink
        if self.relaying:
            return
        self.relaying = True
        receipt = self.receipt
        if receipt is None or receipt.call.done:
            return
        receipt.discharge()
        if not self.eager and receipt.call.hold():
            self._timer = self._loop.call_later(HOLD_SECONDS, self._release)

    def give_up(self, failure: Failure) -> None:
        """It takes too long: both legs fail."""
        for leg in (self.answer, self.receipt):
            if leg is not None and not leg.call.done:
                leg.call.fail(failure)
                self._lose(leg)
                leg.settle(self._loop.time())
        self._pulse.ring()

    def cancel(self) -> None:
        """Close what is not over, except a receipt that drains behind a complete answer. Idempotent."""
        answer = self.answer
        answer.call.cancel()
        answer.settle(self._loop.time())
        if not answer.call.complete or self.lost is not None:
            self._stop_receipt()

    def _judge(self, call: Call) -> None:
        if self.strict and call.complete and not is_sound(call):
            call.spoil(Failure(Fault.GARBAGE, "its reply is not, or not all of, what was asked for"))

    def _answered(self, call: Call) -> None:
        receipt = self.receipt
        if receipt is None or receipt.call.done:
            return
        self._release()
        if call.complete:
            self._timer = self._loop.call_later(DRAIN_SECONDS, self._stop_receipt)

    def _release(self) -> None:
        self._stop_timer()
        if self.receipt is not None:
            self.receipt.call.release()

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
        self._stop_timer()
        receipt = self.receipt
        if receipt is not None and not receipt.call.done:
            receipt.call.cancel()
            receipt.settle(self._loop.time())

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @staticmethod
    def _streams(call: Call) -> bool:
        return call.received > 0 and call.events


def _is_error(call: Call) -> bool:
    """A stream that begins with a failure: nothing of the answer is there yet."""
    return bool(call.chunks) and call.chunks[0].startswith(EVENT_ERRORS) and call.events


def _code(event: bytes) -> int:
    """The HTTP status that an error event speaks of; 500 if it names none."""
    found = _CODE.search(event)
    if found is not None:
        return int(found[1])
    return 400 if b"invalid_request_error" in event else 500


def _refused(receipt: Call) -> bool:
    """A failure that came with status 200: an error event, or a sequence that was aborted."""
    if not receipt.complete or not receipt.chunks:
        return False
    body = receipt.chunks[0] if len(receipt.chunks) == 1 else b"".join(receipt.chunks)
    return body.startswith(RECEIPT_ERRORS) or (b'"abort"' in body and any(mark in body for mark in ABORTED))


class LegFailed(BatonError):
    """A worker could not be reached, or broke off: 502, and a new attempt may work."""

    status, code, retryable = 502, "worker_failed", True

    @classmethod
    def of(cls, leg: Leg) -> LegFailed:
        failure = leg.call.failure or Failure(Fault.RESET, "it broke off")
        return cls(f"{leg.worker.name}: {failure.message}")
