"""Requests and tokens per minute and key: token buckets, pure; time is a parameter.

    charge = limiter.take("alice", limits, prompt + max_tokens, now)    a Charge, or Refused
    limiter.settle(charge, tokens_used, now)                            at the end: what was not used comes back
    limiter.cancel(charge, now)                                         instead: the request was not served at all

A bucket holds a minute's worth and is one number: when it will be full again. Taking moves that later, giving back
earlier; a full bucket is as good as none, so it may be forgotten.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from itertools import islice

from baton.gateway.admission import Refused

Header = tuple[bytes, bytes]

MINUTE = 60.0
ROUNDING = 1e-6
"""Seconds, or tokens: less is a rounding error."""
LOOKED_AT = 8
"""Least recently used buckets that are looked at for one that is full."""


@dataclass(frozen=True, slots=True)
class RateLimits:
    """Of one key, per minute; 0: unlimited."""

    requests_per_minute: int = 0
    tokens_per_minute: int = 0


UNLIMITED = RateLimits()


@dataclass(slots=True, eq=False)
class _Buckets:
    """When both are full again."""

    requests: float = -math.inf
    tokens: float = -math.inf


@dataclass(slots=True, eq=False)
class Charge:
    """What one request has taken. To be settled or cancelled; only the first time counts."""

    limits: RateLimits
    tokens: int
    buckets: _Buckets | None
    """None: there is nothing to give back."""


class RateLimiter:
    """The buckets of up to `max_keys` keys at once."""

    def __init__(self, max_keys: int = 10_000) -> None:
        self._max_keys = max_keys
        self._keys: OrderedDict[str, _Buckets] = OrderedDict()
        """The least recently used one first."""

    def __len__(self) -> int:
        return len(self._keys)

    def take(self, key: str, limits: RateLimits, tokens: int, now: float) -> Charge | Refused:
        """One request of at most `tokens` tokens. Nothing is taken if either bucket has too little."""
        if limits == UNLIMITED:
            return Charge(limits, tokens, None)
        if limits.tokens_per_minute and tokens > limits.tokens_per_minute:
            reason = f"the request asks for up to {tokens} tokens, more than the {limits.tokens_per_minute} per minute"
            return Refused(429, int(MINUTE), f"{reason} of its key: send less, or name a smaller max_tokens")
        buckets = self._buckets(key, now)
        if buckets is None:
            return Refused(429, 1, "more keys are in use than this gateway keeps count of")
        requests_at = _later(buckets.requests, 1, limits.requests_per_minute, now)
        tokens_at = _later(buckets.tokens, tokens, limits.tokens_per_minute, now)
        wait = max(requests_at, tokens_at) - now - MINUTE
        if wait > ROUNDING:
            what = "requests" if requests_at > tokens_at else "tokens"
            limit = limits.requests_per_minute if requests_at > tokens_at else limits.tokens_per_minute
            return Refused(
                429, max(1, math.ceil(wait - ROUNDING)), f"the limit of {limit} {what} per minute is reached"
            )
        buckets.requests, buckets.tokens = requests_at, tokens_at
        return Charge(limits, tokens, buckets)

    def settle(self, charge: Charge, tokens_used: int, now: float) -> None:
        """It is over. Tokens beyond those charged are owed: the bucket takes longer to fill."""
        buckets, charge.buckets = charge.buckets, None
        if buckets is not None:
            buckets.tokens = _later(buckets.tokens, tokens_used - charge.tokens, charge.limits.tokens_per_minute, now)

    def cancel(self, charge: Charge, now: float) -> None:
        """It was refused for another reason, or nobody was there to serve it: as if it had not come."""
        buckets = charge.buckets
        self.settle(charge, 0, now)
        if buckets is not None:
            buckets.requests = _later(buckets.requests, -1, charge.limits.requests_per_minute, now)

    def headers(self, key: str, limits: RateLimits, now: float) -> list[Header]:
        """OpenAI's x-ratelimit-*: the limit, what is left of it, and how long until all of it is there again."""
        buckets, found = self._keys.get(key) or _Buckets(), []
        for name, limit, full_at in (
            (b"requests", limits.requests_per_minute, buckets.requests),
            (b"tokens", limits.tokens_per_minute, buckets.tokens),
        ):
            if limit:
                reset = max(0.0, full_at - now)
                left = max(0, math.floor((MINUTE - reset) * limit / MINUTE + ROUNDING))
                found += [
                    (b"x-ratelimit-limit-" + name, b"%d" % limit),
                    (b"x-ratelimit-remaining-" + name, b"%d" % left),
                    (b"x-ratelimit-reset-" + name, duration(reset).encode()),
                ]
        return found

    def _buckets(self, key: str, now: float) -> _Buckets | None:
        """Those of `key`; new ones are full. None if there is no place for new ones."""
        buckets = self._keys.get(key)
        if buckets is not None:
            self._keys.move_to_end(key)
            return buckets
        if len(self._keys) >= self._max_keys:
            full = (k for k, b in islice(self._keys.items(), LOOKED_AT) if b.requests <= now and b.tokens <= now)
            forgotten = next(full, None)
            if forgotten is None:
                return None
            del self._keys[forgotten]
        buckets = self._keys[key] = _Buckets()
        return buckets


def duration(seconds: float) -> str:
    """As OpenAI writes it: 0s, 120ms, 8.64s, 6m0s, 1h0m0s. Rounded up to milliseconds."""
    milliseconds = math.ceil(seconds * 1000 - 1e-3)
    if milliseconds <= 0:
        return "0s"
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    tail = f"{rest / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes}m{tail}"
    return f"{minutes}m{tail}" if minutes else tail


def _later(full_at: float, amount: int, per_minute: int, now: float) -> float:
    """When a bucket is full again after `amount` was taken from it (given back, if negative)."""
    if not per_minute or not amount:
        return full_at
    return max(full_at, now) + amount * MINUTE / per_minute
