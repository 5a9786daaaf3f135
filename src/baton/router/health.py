"""A circuit breaker per worker: pure values, time is a parameter.

closed ── `limits.failures` in a row ──▶ open ── cooldown ──▶ half open ── trial succeeds ──▶ closed
                                          ▲                      └──────── trial fails ──┐
                                          └──────────── twice the cooldown ──────────────┘
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["closed", "open", "half_open"]


@dataclass(frozen=True, slots=True)
class Limits:
    failures: int = 3
    """Failures in a row that open the breaker."""
    cooldown: float = 1.0
    """Seconds a breaker stays open the first time; doubles with every failed trial."""
    longest: float = 30.0


@dataclass(frozen=True, slots=True)
class Breaker:
    failures: int = 0
    """In a row."""
    opened: int = 0
    """How many times it opened since it was last closed; 0: closed."""
    until: float = 0.0
    """Open before this time, half open from it on."""
    trial: bool = False
    """A trial is on its way; its end decides."""


CLOSED = Breaker()


def state(breaker: Breaker, now: float) -> State:
    if not breaker.opened:
        return "closed"
    return "open" if now < breaker.until else "half_open"


def allows(breaker: Breaker, now: float) -> bool:
    """May a request be sent? A half-open breaker allows one trial: see `tried`."""
    return not breaker.opened or now >= breaker.until


def tried(breaker: Breaker, now: float, limits: Limits) -> Breaker:
    """A request was just sent. While a half-open breaker's trial runs, no second one is allowed for a cooldown."""
    if not breaker.opened:
        return breaker
    return Breaker(breaker.failures, breaker.opened, now + _cooldown(breaker.opened, limits), trial=True)


def failed(breaker: Breaker, now: float, limits: Limits) -> Breaker:
    """A request failed through the worker's fault. Stragglers that fail while it is open only count."""
    failures = breaker.failures + 1
    if breaker.opened and not breaker.trial:
        return Breaker(failures, breaker.opened, breaker.until)
    if not breaker.opened and failures < limits.failures:
        return Breaker(failures)
    opened = breaker.opened + 1
    return Breaker(failures, opened, now + _cooldown(opened, limits))


def succeeded(breaker: Breaker) -> Breaker:
    return breaker if breaker == CLOSED else CLOSED


class RetryBudget:
    """How many second attempts all requests together may cause: a fleet that fails as a whole is not asked several
    times for everything. `share` of the requests may be repeated, and `burst` beyond that."""

    __slots__ = ("_burst", "_left", "_share")

    def __init__(self, burst: float = 256.0, share: float = 0.5) -> None:
        self._burst, self._share = burst, share
        self._left = burst

    def earn(self) -> None:
        """A request has come."""
        self._left = min(self._burst, self._left + self._share)

    def spend(self) -> bool:
        """May one be repeated? Uses up one, if so."""
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True


def _cooldown(opened: int, limits: Limits) -> float:
    return float(min(limits.longest, limits.cooldown * 2 ** min(opened - 1, 16)))
