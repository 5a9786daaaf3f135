"""When a wait is over: of a whole request, and of a stage of it."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from baton.base.timeout import header_line
from baton.router.call import Failure, Fault
from baton.router.legs import Legs, Pulse
from baton.router.wheel import Wheel

GRACE_SECONDS = 5.0
"""After a deadline: until a request whose client does not even read is broken off."""


class Deadline:
    """The end of a request: first told to whoever waits for a worker; then, if the client does not read, by force."""

    __slots__ = ("_pulse", "_seconds", "_timer", "_wheel", "forced", "until")

    def __init__(self, pulse: Pulse, wheel: Wheel, seconds: float) -> None:
        self._pulse, self._wheel, self._seconds = pulse, wheel, seconds
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
        task = self._pulse.task
        if task is not None:
            self.forced = True
            task.cancel()


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds that a phase of an attempt may take before its answer begins."""

    stage: float
    slack: float
    """Of what is long by nature: a plain answer, of which nothing comes until it is complete, and the queue of a worker
    that does everything."""


class Phase(enum.Enum):
    """What is waited for; what did not come if it takes too long."""

    PREFILL = "no first token"
    DECODE = "no answer after the prefill"
    WHOLE = "no answer"
    ARRIVING = "an answer that began did not come in"
    REFUSING = "nothing from a worker that refuses its checks"


class Stage:
    """Gives up an attempt whose answer does not begin in time. It looks rarely: a phase may last half as long again."""

    __slots__ = ("_legs", "_limits", "_phase", "_since", "_stream", "_timer", "_wheel")

    def __init__(self, legs: Legs, wheel: Wheel, limits: Limits, *, stream: bool) -> None:
        """`stream`: one is asked for."""
        self._legs, self._wheel, self._limits, self._stream = legs, wheel, limits, stream
        self._phase = Phase.PREFILL if legs.receipt is not None else Phase.WHOLE
        self._since = wheel.loop.time()
        self._timer = wheel.call_later(limits.stage, self._look)

    def cancel(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        legs, now = self._legs, self._wheel.loop.time()
        if legs.lost is not None or legs.answer.call.done:
            return
        phase = self._phase_now()
        if phase is not self._phase:
            self._phase, self._since = phase, now
        limit = self._limit(phase)
        if now < self._since + limit:
            self._timer = self._wheel.call_later(min(self._since + limit - now, self._limits.stage / 2), self._look)
        else:
            legs.give_up(Failure(Fault.LATE, f"{phase.value} within {limit:.0f} s, which is long for this request"))

    def _phase_now(self) -> Phase:
        answer, receipt = self._legs.answer, self._legs.receipt
        if answer.call.last:
            return Phase.ARRIVING
        if not answer.worker.healthy:
            return Phase.REFUSING
        if receipt is None:
            return Phase.WHOLE
        return Phase.DECODE if receipt.call.done else Phase.PREFILL

    def _limit(self, phase: Phase) -> float:
        patient = phase is Phase.WHOLE or (phase is Phase.DECODE and not self._stream)
        return self._limits.slack if patient else self._limits.stage
