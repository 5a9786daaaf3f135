"""The waiting side of admission: one coroutine per request asks, waits, goes through, and gives back.

What is decided, and in which order, is `admission`'s and `ratelimit`'s business; time and waking up are this file's.
"""

from __future__ import annotations

import asyncio
import math
import re

from baton.base.errors import BatonError
from baton.gateway.admission import ADMITTED, Admission, AdmissionLimits, Claim, Refused
from baton.gateway.keys import Identity
from baton.gateway.ratelimit import Charge, RateLimiter
from baton.router.call import Header
from baton.router.legs import Pulse
from baton.router.router import Router

COMPLETION_TOKENS = re.compile(rb'"completion_tokens": ?([0-9]{1,9})')


class Overloaded(BatonError):
    """Too much is asked for at once, or by one key: come back later."""

    status, code, retryable = 429, "rate_limited", True

    @classmethod
    def of(cls, refused: Refused) -> Overloaded:
        error = cls(refused.reason)
        error.status, error.retry_after = refused.status, float(refused.retry_after)
        if refused.status == 503:
            error.code = "overloaded"
        return error


class Pass:
    """One request that was let in; `leave` is called once, in any case."""

    __slots__ = ("_turnstile", "charge", "claim", "headers")

    def __init__(self, turnstile: Turnstile, claim: Claim, charge: Charge, headers: list[Header]) -> None:
        self._turnstile = turnstile
        self.claim = claim
        self.charge = charge
        self.headers = headers
        """How much the key has left, for the client."""

    def prefilled(self) -> None:
        """The prompt is computed."""
        self._turnstile.admission.prefilled(self.claim, self._turnstile.now())

    def leave(self, output_tokens: int | None) -> None:
        """`output_tokens`: how many were generated; None: not known, as many as were asked for."""
        self._turnstile.leave(self, output_tokens)


class Turnstile:
    def __init__(self, limits: AdmissionLimits, router: Router) -> None:
        self.admission = Admission(limits)
        self._limiter = RateLimiter()
        self._router = router
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        router.watch(self._resize)
        self._resize()

    def now(self) -> float:
        return self._loop.time()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    async def enter(self, claim: Claim, identity: Identity, pulse: Pulse) -> Pass:
        """Raises `Overloaded`, `ClientGone`, `TimedOut`."""
        now = self._loop.time()
        tokens = claim.prompt_tokens + claim.output_tokens
        charge = self._limiter.take(identity.name, identity.limits, tokens, now)
        if isinstance(charge, Refused):
            raise Overloaded.of(charge)
        try:
            verdict = self.admission.ask(claim, now)
            if verdict is not ADMITTED:
                await self._wait(claim, pulse)
        except BaseException:
            self._limiter.cancel(charge, self._loop.time())
            self.admission.withdraw(claim, self._loop.time())
            raise
        headers = self._limiter.headers(identity.name, identity.limits, now) if charge.buckets is not None else []
        return Pass(self, claim, charge, headers)

    def leave(self, passed: Pass, output_tokens: int | None) -> None:
        now, claim = self._loop.time(), passed.claim
        self.admission.done(claim, now)
        if passed.charge.buckets is not None:
            used = claim.output_tokens if output_tokens is None else output_tokens
            self._limiter.settle(passed.charge, claim.prompt_tokens + used, now)

    async def _wait(self, claim: Claim, pulse: Pulse) -> None:
        if isinstance(claim.verdict, Refused):
            raise Overloaded.of(claim.verdict)
        claim.notify = pulse.ring
        self._wind()
        while claim.verdict is not ADMITTED:
            if isinstance(claim.verdict, Refused):
                raise Overloaded.of(claim.verdict)
            await pulse.wait()

    def _wind(self) -> None:
        """The timer goes off when the next one's patience ends."""
        if self._timer is not None:
            self._timer.cancel()
        due = self.admission.next_deadline()
        self._timer = None if due is None or math.isinf(due) else self._loop.call_at(due, self._tick)

    def _tick(self) -> None:
        self.admission.tick(self._loop.time())
        self._wind()

    def _resize(self) -> None:
        """As many places as workers can serve. With none there is still one: how long to wait for a worker, and what to
        say, is known better further on."""
        workers = self._router.registry.snapshot.workers
        answering = sum(worker.role != "prefill" for worker in workers)
        prefill = sum(worker.role != "decode" for worker in workers)
        self.admission.resize(max(1, prefill or answering), max(1, answering), self._loop.time())


def completion_tokens(body: bytes) -> int | None:
    """What a whole reply says of its length, without parsing it; None if it says nothing."""
    if b'"completion_tokens"' not in body:
        return None
    found = COMPLETION_TOKENS.findall(body)
    return sum(map(int, found)) if found else None
