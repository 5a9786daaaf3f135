"""One request's way through the workers: attempts, until one of them has answered to the end.

    plan ──▶ send ──▶ ready? ── yes ──▶ relay ── complete ──▶ done
      ▲                  │ no             │ the worker fails
      │                  ▼                ▼
      └── again? ◀── what was lost    resume: the same request, and the tokens that the client has already
                │ no
                ▼
           pass the error on

Before the client has seen anything an attempt is simply repeated, elsewhere if it can be: with another prefill worker,
and where there is none left, the decode worker prefills itself. A stream that has begun is continued on another worker,
from the tokens that were passed on (`baton.gateway.journal`). Only if neither is possible does the client hear of it.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from time import monotonic

from msgspec.structs import replace

from baton.base.errors import Unavailable
from baton.gateway.deadlines import Deadline, Limits, Stage
from baton.gateway.merge import Merger
from baton.gateway.metrics import Metrics
from baton.gateway.relay import Relay, Stall
from baton.gateway.timeline import Attempt, Timeline
from baton.gateway.turnstile import Pass
from baton.router import splice
from baton.router.ask import Ask
from baton.router.call import Fault
from baton.router.health import RetryBudget
from baton.router.legs import Leg, LegFailed, Legs, Pulse
from baton.router.registry import Runtime, Worker
from baton.router.router import NOBODY, Router
from baton.router.target import Parcel, Target
from baton.router.wheel import Wheel

log = logging.getLogger("baton.gateway")

RETRYABLE_STATUSES = frozenset({500, 502, 503, 504})
ERROR_BODY_SECONDS = 2.0
"""How long a failed leg may take to say what is wrong."""
STALE_RETRIES = 2
"""Connections that were closed while idle are nobody's fault, and counted apart."""
RESUMES = 8
"""How often one stream may be continued."""
QUEUE_SLACK, LAST_QUEUE_SLACK = 4.0, 16.0
"""How many times its estimate a prefill may take, its queue included, on top of `Patience.stage`."""
BACKOFF = 0.05
"""Seconds before the first attempt with workers that have failed this request already; doubles."""
RECHECK = 0.1
"""Seconds between looks at whether one of those has passed a check."""
SLACK = 16.0
"""Times as long as usual, and as much as was allowed, a plain answer may take; doubles."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long and how often."""

    stall: float
    """Seconds without a byte in the middle of an answer."""
    stage: float
    """Seconds until a prefill worker must have done its part, at least; more for long prompts and queues."""
    workers: float
    """Seconds to wait for a usable worker, if there was one lately."""
    retries: int


class Journey:
    def __init__(
        self,
        router: Router,
        wheel: Wheel,
        metrics: Metrics,
        budget: RetryBudget,
        patience: Patience,
        parcel: Parcel,
        ask: Ask,
        relay: Relay,
        pulse: Pulse,
        deadline: Deadline,
        timeline: Timeline,
        passed: Pass,
        *,
        paired: bool,
    ) -> None:
        self._router = router
        self._wheel = wheel
        self._metrics = metrics
        self._budget = budget
        self._patience = patience
        self._asked = self._parcel = parcel
        self._ask = ask
        self._relay = relay
        self._pulse = pulse
        self._deadline = deadline
        self._timeline = timeline
        self._passed = passed
        self._paired = paired
        self._loop = wheel.loop
        self._avoid: dict[Worker, float] = {}
        """Who failed this request, and when (loop time)."""
        self._retries = patience.retries
        self._stale = STALE_RETRIES
        self._resumes = RESUMES
        self._failures = 0

    async def run(self) -> None:
        """Raises `ClientGone`, and the errors that the client must be told: `Unavailable`, `LegFailed`, `TimedOut`."""
        lost: Leg | None = None
        while True:
            target = await self._target(lost)
            if target is None:
                assert lost is not None
                await self._pass_on(lost)
                return
            attempt = Attempt(target, monotonic(), resumed=self._relay.started)
            self._timeline.attempts.append(attempt)
            self._parcel.timeout = self._deadline.header()
            legs = self._router.send(target, self._parcel, self._pulse)
            legs.eager, legs.strict = bool(self._parcel.body.merge), self._paired
            attempt.answer = legs.answer.call.headers
            if legs.receipt is not None:
                attempt.receipt = legs.receipt.call.headers
            try:
                lost = await self._attempt(legs, attempt)
                if lost is None:
                    return
                if not self._again(lost):
                    await self._pass_on(lost)
                    return
            finally:
                legs.cancel()
                attempt.ended = monotonic()

    async def _attempt(self, legs: Legs, attempt: Attempt) -> Leg | None:
        """None: answered. Else what was lost."""
        stage = Stage(legs, self._wheel, self._limits(legs), stream=self._parcel.body.stream)
        try:
            await legs.ready()
        finally:
            stage.cancel()
        lost = legs.lost
        if lost is None:
            attempt.begun = monotonic()
            self._passed.prefilled()
            lost = await self._deliver(legs)
        if lost is not None:
            attempt.lost = f"{lost.role} {_kind(lost)}"
            self._metrics.leg_error(lost.role, _kind(lost))
            log.info("%s: attempt lost at %r", self._parcel.path, lost)
            self._shun(legs, lost)
        return lost

    async def _deliver(self, legs: Legs) -> Leg | None:
        """The answer has begun: pass it on. None: to its end. Else what was lost."""
        answer = legs.answer.call
        events = answer.events
        if self._relay.started and not events:
            return legs.answer  # it was asked to go on with a stream
        edit = None
        if self._parcel.body.merge and legs.receipt is not None:
            receipt = legs.receipt.call
            if not await self._collect(legs.receipt) or receipt.status >= 400:
                return legs.receipt
            merger = Merger(self._parcel.body.merge, receipt.take(), stream=receipt.events)
            if not events:
                if not await self._collect(legs.answer):
                    return legs.answer
                self._relay.whole(answer, merger.whole(answer.take()))
                return None
            edit = merger.events
        if answer.complete and not events:
            self._relay.whole(answer, answer.take())
            return None
        stall = Stall(legs, self._relay, self._pulse, self._wheel, self._patience.stall)
        try:
            return None if await self._relay.stream(legs, self._pulse, edit) else legs.answer
        finally:
            stall.cancel()

    async def _collect(self, leg: Leg) -> bool:
        """Wait for the whole body of a leg, however large. False: it failed."""
        while not leg.call.done:
            leg.call.unbound()
            await self._pulse.wait()
        return leg.call.complete

    def _limits(self, legs: Legs) -> Limits:
        """From what is in flight on the prefill worker, this prompt included, at measured speed: a queue is no failure.
        Who waits for the last time waits longer, and for the rest of an answer as long as it takes."""
        speeds, last = self._router.planner.speeds, not self._retries
        queued = legs.receipt.worker.load / speeds.costs().prefill_speed if legs.receipt is not None else 0.0
        stage = self._patience.stage + (LAST_QUEUE_SLACK if last else QUEUE_SLACK) * queued
        if last:
            return Limits(stage, math.inf)
        usual = speeds.duration(0.0, self._asked.body.max_tokens)
        return Limits(stage, stage + SLACK * 2**self._failures * usual)

    # --- the next attempt

    async def _target(self, lost: Leg | None) -> Target | None:
        """Where to send it; None if there is nowhere, and something was lost that the client can be told of."""
        until = self._loop.time() + self._patience.workers
        while True:
            try:
                return self._plan(frozenset(self._avoid) if self._avoid else NOBODY)
            except Unavailable as error:
                left = until - self._loop.time()
                if lost is not None and self._forgive(lost, left):
                    await self._pause()
                elif left > 0 and self._router.hopeful():
                    await self._router.change(self._pulse, min(left, RECHECK) if self._avoid else left)
                elif lost is None:
                    raise error
                else:
                    return None

    def _forgive(self, lost: Leg, left: float) -> bool:
        """Better the same ones again than nobody: those that live and may do better the next time, or that have passed
        a check since. False if there are none. `left`: seconds there are to wait for better."""
        lives = lost.fault in (Fault.LATE, Fault.STALE) or (lost.fault is None and lost.status == 502)
        busy = lost.fault is None and lost.status == 503
        if lives or (busy and left <= 0):
            forgiven = list(self._avoid)
        else:
            forgiven = [worker for worker, when in self._avoid.items() if worker.seen > when]
        for worker in forgiven:
            del self._avoid[worker]
        return bool(forgiven)

    def _plan(self, avoid: frozenset[Worker]) -> Target:
        if not self._paired:
            return self._router.plan_one(avoid, self._parcel.body.model)
        runtime: Runtime = "baton" if self._relay.started else "auto"  # only our own workers can continue a stream
        return self._router.plan(self._ask, self._parcel.body.model, avoid, runtime)

    async def _pause(self) -> None:
        seconds = BACKOFF * 2 ** min(self._failures, 6)
        until = self._loop.time() + seconds
        while (left := until - self._loop.time()) > 0:
            await self._router.change(self._pulse, left)

    def _again(self, lost: Leg) -> bool:
        """Is another attempt allowed? Prepares it."""
        if self._relay.started:
            return self._resume(lost)
        if lost.fault is Fault.STALE and self._stale:
            self._stale -= 1
            return True
        if lost.fault is None and lost.status not in RETRYABLE_STATUSES:
            return False
        self._retries -= 1
        return self._retries >= 0 and self._budget.spend()

    def _resume(self, lost: Leg) -> bool:
        """Go on with the stream elsewhere."""
        notes, asked = self._relay.journal, self._asked
        self._resumes -= 1
        refused = lost.fault is None and lost.status not in RETRYABLE_STATUSES and not lost.call.events
        if notes is None or not notes.kept or refused or self._resumes < 0:
            return False
        ours = replace(asked.body, raw=splice.single(asked.body), claimed=False)
        self._parcel = replace(asked, body=replace(ours, raw=notes.resume(ours)))
        return True

    def _shun(self, legs: Legs, lost: Leg) -> None:
        """Prefer others for the next attempt. Who was late, and who only waited for it, cannot be told apart."""
        if lost.fault is Fault.STALE:
            return
        self._failures += 1
        self._avoid[lost.worker] = now = self._loop.time()
        if lost.fault is Fault.LATE and lost is legs.answer and legs.receipt is not None:
            self._avoid[legs.receipt.worker] = now
        if lost.fault is None and lost.status < 400:
            lost.doubt()  # HTTP was content with it

    # --- the end

    async def _pass_on(self, lost: Leg) -> None:
        """Tell the client what a worker said; raises `LegFailed` if it said nothing."""
        call = lost.call
        if lost.fault is not None or self._relay.started:
            raise LegFailed.of(lost)
        patience = self._loop.call_later(ERROR_BODY_SECONDS, self._pulse.expire, "a worker's error message did not end")
        try:
            while not call.done and not call.paused:
                await self._pulse.wait()
        finally:
            patience.cancel()
        if call.failure is not None:
            raise LegFailed.of(lost)
        self._relay.whole(call, call.take())


def _kind(lost: Leg) -> str:
    if lost.fault is not None:
        return lost.fault.value
    return f"status_{lost.status // 100}xx" if lost.status >= 400 else "unfinished"
