"""When a wait is over: of a whole request, and of a stage of it."""

from __future__ import annotations

import asyncio

from baton.base.timeout import header_line
from baton.router.call import Failure, Fault
from baton.router.legs import Legs, Pulse
from baton.router.wheel import Wheel

GRACE_SECONDS = 5.0
"""After a deadline: until a request whose client does not even read is broken off."""


class Deadline:
    """The end of a request: first told to whoever waits for a worker; then, if the client does not read, by force."""

    __slots__ = ("_pulse", "_seconds", "_task", "_timer", "_wheel", "forced", "until")

    def __init__(self, pulse: Pulse, wheel: Wheel, seconds: float) -> None:
        self._pulse, self._wheel, self._seconds = pulse, wheel, seconds
        self._task = asyncio.current_task()
        self.forced = False
        """The task was cancelled by us."""
        self.until = wheel.loop.time() + seconds
        self._timer = wheel.call_at(self.until, self._expire)

    def header(self) -> bytes:
        """For the workers, how long they have: a gateway that is lost cannot cancel."""
        return header_line(self.until - self._wheel.loop.time())

    def cancel(self) -> None:
        self._timer.cancel()

    def _expire(self) -> None:
        self._pulse.expire(f"the request was not finished within {self._seconds:g} s")
        self._timer = self._wheel.call_later(GRACE_SECONDS, self._force)

    def _force(self) -> None:
        if self._task is not None:
            self.forced = True
            self._task.cancel()


class Stage:
    """Gives up a pair that does not come to its first token in time, unless the prefill worker has done its part: how
    long the decode worker's own queue is, is no business of this clock."""

    __slots__ = ("_legs", "_seconds", "_timer")

    def __init__(self, legs: Legs, wheel: Wheel, seconds: float) -> None:
        self._legs, self._seconds = legs, seconds
        self._timer = wheel.call_later(seconds, self._late)

    def cancel(self) -> None:
        self._timer.cancel()

    def _late(self) -> None:
        legs = self._legs
        if legs.lost is None and not legs.begun and legs.receipt is not None and not legs.receipt.call.done:
            message = f"no first token within {self._seconds:.0f} s, which is long for this prompt"
            legs.give_up(Failure(Fault.LATE, message))
