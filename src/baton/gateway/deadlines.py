"""When a wait is over: of a whole request, and of a stage of it."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from baton.base.timeout import header_line
from baton.router.call import Failure, Fault
from baton.router.legs import Legs, Pulse
from baton.router.target import Parcel

GRACE_SECONDS = 5.0
"""After a deadline: until a request whose client does not even read is broken off."""


class Deadline:
    """The end of a request: first told to whoever waits for a worker; then, if the client does not read, by force."""

    __slots__ = ("_loop", "_message", "_pulse", "_task", "_timer", "forced", "until")

    def __init__(self, pulse: Pulse, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        self._pulse, self._loop, self._task = pulse, loop, asyncio.current_task()
        self.forced = False
        """The task was cancelled by us."""
        self._message = f"the request was not finished within {seconds:g} s"
        self.until = loop.time() + seconds
        self._timer = loop.call_at(self.until, self._expire)

    @property
    def left(self) -> float:
        return self.until - self._loop.time()

    def sent_with(self, parcel: Parcel) -> Parcel:
        """The worker hears how long it has: a gateway that is lost cannot cancel."""
        return replace(parcel, headers=parcel.headers + header_line(self.left))

    def cancel(self) -> None:
        self._timer.cancel()

    def _expire(self) -> None:
        self._pulse.expire(self._message)
        if self._task is not None:
            self._timer = self._loop.call_later(GRACE_SECONDS, self._force, self._task)

    def _force(self, task: asyncio.Task[None]) -> None:
        self.forced = True
        task.cancel()


class Stage:
    """Gives up a pair that does not come to its first token in time, unless the prefill worker has done its part: how
    long the decode worker's own queue is, is no business of this clock."""

    __slots__ = ("_legs", "_seconds", "_timer")

    def __init__(self, legs: Legs, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        self._legs, self._seconds = legs, seconds
        self._timer = loop.call_later(seconds, self._late)

    def cancel(self) -> None:
        self._timer.cancel()

    def _late(self) -> None:
        legs = self._legs
        if legs.lost is None and not legs.begun and legs.receipt is not None and not legs.receipt.call.done:
            message = f"no first token within {self._seconds:.0f} s, which is long for this prompt"
            legs.give_up(Failure(Fault.LATE, message))
