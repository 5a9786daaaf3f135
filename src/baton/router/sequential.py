"""An attempt whose prefill comes first: the decode worker is asked once the prefill worker has answered.

Its place there is taken from the start, so an answer of the prefill worker is never left waiting for one. What the
prefill worker keeps for the decode worker is let go when the decode worker says so. Therefore a decode leg that nobody
wants any more is not closed before the worker can have noticed it (`LINGER_SECONDS`): a request that it never saw frees
nothing, and the memory stays taken until a lease runs out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from baton.router.call import Call, Failure
from baton.router.legs import Leg, Legs, Pulse

LINGER_SECONDS = 1.0
"""Between sending a decode leg and closing it, at least, unless it has begun to answer."""


def _nothing(said: bytes) -> None:
    """Nobody is asked next."""


class Sequential(Legs):
    """`proceed` is called with the prefill worker's complete answer, once, and sends the decode leg; `failed` is called
    if the attempt is lost."""

    __slots__ = ("_asked", "_lingering", "failed", "prefill", "proceed")

    def __init__(
        self, pulse: Pulse, loop: asyncio.AbstractEventLoop, answer: Leg, receipt: Leg, failed: Callable[[], None]
    ) -> None:
        super().__init__(pulse, loop, answer, receipt)
        self.prefill = receipt
        self.proceed: Callable[[bytes], None] = _nothing
        self.failed = failed
        self._asked = 0.0
        """When the decode leg was sent; 0.0: not yet."""
        self._lingering = False

    def on_receipt(self, call: Call) -> None:
        super().on_receipt(call)
        if call.complete and self.lost is None and not self._asked:
            self._asked = self._loop.time()
            self.proceed(call.take())

    def refuse(self, failure: Failure) -> None:
        """The prefill worker cannot even be asked."""
        call = self.prefill.call
        if not call.done:
            call.end(failure)
            self.on_receipt(call)

    def give_up(self, failure: Failure) -> None:
        """It takes too long. Before the decode worker is asked only the prefill worker can be late."""
        if self._asked:
            super().give_up(failure)
            return
        self.prefill.call.fail(failure)
        self._lose(self.prefill)
        self.prefill.settle(self._loop.time())

    def cancel(self) -> None:
        call = self.answer.call
        unnoticed = self._asked and self.lost is None and not call.done and not call.received
        left = self._asked + LINGER_SECONDS - self._loop.time()
        if not unnoticed or not (call.request or left > 0):
            self._end()
        elif not self._lingering:
            self._lingering = True
            call.notify = self._noticed
            self._timer = self._loop.call_later(max(left, LINGER_SECONDS / 4), self._overdue)

    def _noticed(self, call: Call) -> None:
        if call.done or call.received or call.status >= 400:
            self._end()

    def _overdue(self) -> None:
        if self.answer.call.request and not self.answer.call.done:  # there is no connection yet
            self._timer = self._loop.call_later(LINGER_SECONDS / 4, self._overdue)
        else:
            self._end()

    def _end(self) -> None:
        self._stop_timer()
        super().cancel()

    def _lose(self, leg: Leg) -> None:
        first = self.lost is None
        super()._lose(leg)
        if first:
            self.failed()
