"""Remembers requests: those in progress, the last ones, and a sample that is looked at more closely.

Per request there are a few stores and one append. Parsing what workers say of their stages is left to whoever looks;
for the histograms of stages and for the router's speeds a sample of `SAMPLES` requests a second is enough.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

from baton.gateway.metrics import Metrics
from baton.gateway.stages import marks, stages
from baton.gateway.timeline import Attempt, Timeline
from baton.router.speeds import Speeds

KEPT = 2048
"""Finished requests."""
SAMPLES = 5.0
"""Requests a second whose stages are looked at: all of them, if there are no more."""


class Sink(Protocol):
    """Wants every finished request: the log, the tracer."""

    def __call__(self, timeline: Timeline) -> None: ...


class Recorder:
    """One per gateway."""

    def __init__(
        self, metrics: Metrics, speeds: Speeds, clock: Callable[[], float], sinks: Iterable[Sink] = ()
    ) -> None:
        self.active: dict[Timeline, None] = {}
        """In progress, the oldest first."""
        self.recent: deque[Timeline] = deque(maxlen=KEPT)
        """Finished, the latest last."""
        self._metrics = metrics
        self._speeds = speeds
        self._clock = clock
        self._sinks = tuple(sinks)
        self._budget = SAMPLES
        self._last = 0.0
        self._sampled: deque[Timeline] = deque()
        metrics.settle = self.digest

    def began(self, timeline: Timeline) -> None:
        self.active[timeline] = None

    def finished(self, timeline: Timeline) -> None:
        """It is over, and its timeline is complete, but for what P says in its receipt."""
        self.active.pop(timeline, None)
        self.recent.append(timeline)
        self._metrics.finished(timeline)
        now = timeline.finished
        self._budget = min(SAMPLES, self._budget + (now - self._last) * SAMPLES)
        self._last = now
        if self._budget >= 1.0:
            self._budget -= 1.0
            if self._sampled:  # one behind: receipts come late
                self._digest(self._sampled.popleft())
            self._sampled.append(timeline)
        for sink in self._sinks:
            sink(timeline)

    def find(self, id: str) -> Timeline | None:
        """The latest with that id, in progress or finished."""
        for timelines in (reversed(self.active), reversed(self.recent)):
            for timeline in timelines:
                if timeline.id == id:
                    return timeline
        return None

    def latest(self, limit: int) -> list[Timeline]:
        """Those in progress, then those finished, the latest first."""
        found = list(reversed(self.active))[:limit]
        for timeline in reversed(self.recent):
            if len(found) >= limit:
                break
            found.append(timeline)
        return found

    def digest(self) -> None:
        """What is sampled goes into the histograms now: somebody looks."""
        while self._sampled:
            self._digest(self._sampled.popleft())

    def _digest(self, timeline: Timeline) -> None:
        self._metrics.staged(timeline, stages(timeline, timeline.finished))
        if timeline.status == 200 and len(timeline.attempts) == 1 and not timeline.error:
            learn(self._speeds, timeline, timeline.attempts[0], self._clock())


def learn(speeds: Speeds, timeline: Timeline, attempt: Attempt, now: float) -> None:
    """What a request that went well says of the workers' speeds."""
    target, said = attempt.target, marks(attempt.answer)
    if target.prefill is not None:
        prefill = marks(attempt.receipt)
        if prefill.prefill:
            speeds.prefilled(target.uncached, prefill.prefill, now)
        if prefill.transfer:
            lacking = target.decision.uncached if target.decision is not None else timeline.prompt_tokens
            speeds.handed_off(lacking, prefill.transfer, now)
    elif said.prefill and target.answering.role == "decode":
        speeds.prefilled_locally(target.uncached, said.prefill, now)
    seconds = timeline.finished - timeline.first if timeline.stream else said.decode
    tokens = timeline.output_tokens // timeline.sequences
    if tokens > 1 and seconds > 0:
        speeds.decoded(tokens - 1, seconds, now)
