"""Requests and tokens per minute, against a bucket that is filled drop by drop."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.gateway.admission import Refused
from baton.gateway.ratelimit import UNLIMITED, Charge, RateLimiter, RateLimits, duration

LIMITS = RateLimits(requests_per_minute=60, tokens_per_minute=6000)


def taken(verdict: Charge | Refused) -> Charge:
    assert isinstance(verdict, Charge)
    return verdict


def refused(verdict: Charge | Refused) -> Refused:
    assert isinstance(verdict, Refused)
    assert verdict.status == 429
    return verdict


def shown(limiter: RateLimiter, now: float, limits: RateLimits = LIMITS) -> dict[str, str]:
    pairs = limiter.headers("a", limits, now)
    return {name.decode().removeprefix("x-ratelimit-"): value.decode() for name, value in pairs}


def test_a_minutes_requests_at_once_then_one_per_second() -> None:
    limiter = RateLimiter()
    for _ in range(60):
        taken(limiter.take("a", LIMITS, 0, 100.0))
    verdict = refused(limiter.take("a", LIMITS, 0, 100.0))
    assert verdict.retry_after == 1
    assert "60 requests" in verdict.reason
    refused(limiter.take("a", LIMITS, 0, 100.9))
    taken(limiter.take("a", LIMITS, 0, 101.0))
    refused(limiter.take("a", LIMITS, 0, 101.0))


def test_no_rounding_costs_the_last_request_of_a_minute() -> None:
    for limit in range(1, 200):
        limiter, limits = RateLimiter(), RateLimits(requests_per_minute=limit)
        for _ in range(limit):
            taken(limiter.take("a", limits, 0, 123456.789))
        assert shown(limiter, 123456.789, limits)["remaining-requests"] == "0"
        refused(limiter.take("a", limits, 0, 123456.789))


def test_retry_after_is_when_the_same_request_would_pass() -> None:
    limiter = RateLimiter()
    taken(limiter.take("a", LIMITS, 5000, 0.0))
    verdict = refused(limiter.take("a", LIMITS, 4000, 0.0))
    assert verdict.retry_after == 30
    assert "6000 tokens" in verdict.reason
    refused(limiter.take("a", LIMITS, 4000, 29.9))
    taken(limiter.take("a", LIMITS, 4000, 30.0))


def test_a_refusal_takes_nothing() -> None:
    limiter = RateLimiter()
    taken(limiter.take("a", LIMITS, 6000, 0.0))
    for _ in range(100):
        refused(limiter.take("a", LIMITS, 1, 0.0))
    assert shown(limiter, 0.0)["remaining-requests"] == "59"


def test_keys_do_not_share() -> None:
    limiter = RateLimiter()
    taken(limiter.take("a", LIMITS, 6000, 0.0))
    taken(limiter.take("b", LIMITS, 6000, 0.0))


def test_what_was_not_used_comes_back_once() -> None:
    limiter = RateLimiter()
    charge = taken(limiter.take("a", LIMITS, 6000, 0.0))
    limiter.settle(charge, 1000, 0.0)
    limiter.settle(charge, 0, 0.0)
    limiter.cancel(charge, 0.0)
    assert shown(limiter, 0.0)["remaining-tokens"] == "5000"
    assert shown(limiter, 0.0)["remaining-requests"] == "59"


def test_a_cancelled_request_was_never_there() -> None:
    limiter = RateLimiter()
    limiter.cancel(taken(limiter.take("a", LIMITS, 6000, 0.0)), 0.0)
    assert shown(limiter, 0.0)["remaining-tokens"] == "6000"
    assert shown(limiter, 0.0)["remaining-requests"] == "60"


def test_what_comes_back_late_does_not_overfill() -> None:
    limiter = RateLimiter()
    limiter.settle(taken(limiter.take("a", LIMITS, 3000, 0.0)), 0, 1000.0)
    taken(limiter.take("a", LIMITS, 6000, 1000.0))
    refused(limiter.take("a", LIMITS, 1, 1000.0))


def test_more_than_charged_is_owed() -> None:
    limiter = RateLimiter()
    limiter.settle(taken(limiter.take("a", LIMITS, 1000, 0.0)), 13_000, 0.0)
    assert shown(limiter, 0.0)["remaining-tokens"] == "0"
    assert refused(limiter.take("a", LIMITS, 1, 0.0)).retry_after == 71
    taken(limiter.take("a", LIMITS, 1, 71.0))


def test_what_can_never_pass_is_told_so() -> None:
    verdict = refused(RateLimiter().take("a", LIMITS, 6001, 0.0))
    assert "max_tokens" in verdict.reason


@given(
    st.lists(
        st.tuples(st.floats(0, 40), st.integers(0, 120), st.floats(0, 1.5)),
        max_size=40,
    )
)
def test_as_a_bucket_that_is_filled_drop_by_drop(requests: list[tuple[float, int, float]]) -> None:
    limits, limiter = RateLimits(6, 120), RateLimiter()
    now, requests_left, tokens_left = 0.0, 6.0, 120.0
    for seconds, tokens, share in requests:
        now += seconds
        requests_left = min(6.0, requests_left + seconds * 6 / 60)
        tokens_left = min(120.0, tokens_left + seconds * 120 / 60)
        verdict = limiter.take("a", limits, tokens, now)
        headroom = min(requests_left - 1, tokens_left - tokens if tokens else 1.0)
        if abs(headroom) > 1e-4:
            assert isinstance(verdict, Charge) == (headroom > 0)
        if isinstance(verdict, Charge):
            requests_left -= 1
            used = int(tokens * share)
            limiter.settle(verdict, used, now)
            tokens_left = min(120.0, tokens_left - used)


def test_headers_are_openais() -> None:
    limiter = RateLimiter()
    taken(limiter.take("a", LIMITS, 4500, 0.0))
    assert shown(limiter, 0.5) == {
        "limit-requests": "60",
        "remaining-requests": "59",
        "reset-requests": "500ms",
        "limit-tokens": "6000",
        "remaining-tokens": "1550",
        "reset-tokens": "44.5s",
    }


def test_headers_of_what_is_not_limited_are_not_there() -> None:
    limiter = RateLimiter()
    taken(limiter.take("a", UNLIMITED, 10**9, 0.0))
    assert shown(limiter, 0.0, UNLIMITED) == {}
    assert set(shown(limiter, 0.0, RateLimits(requests_per_minute=1))) == {
        "limit-requests",
        "remaining-requests",
        "reset-requests",
    }


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0s"),
        (0.0171, "18ms"),
        (0.12, "120ms"),
        (0.9999, "1s"),
        (8.64, "8.64s"),
        (59.9999, "1m0s"),
        (72.5, "1m12.5s"),
        (360.0, "6m0s"),
        (3600.0, "1h0m0s"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_only_full_buckets_are_forgotten() -> None:
    limiter = RateLimiter(max_keys=2)
    slow, quick = RateLimits(requests_per_minute=1), RateLimits(requests_per_minute=60)
    taken(limiter.take("slow", slow, 0, 0.0))
    taken(limiter.take("quick", quick, 0, 0.0))
    refused(limiter.take("new", quick, 0, 0.5))
    taken(limiter.take("new", quick, 0, 2.0))
    assert len(limiter) == 2
    refused(limiter.take("slow", slow, 0, 3.0))


def test_those_in_use_are_not_in_the_way_of_forgetting_others() -> None:
    limiter = RateLimiter(max_keys=20)
    for n in range(20):
        taken(limiter.take(str(n), LIMITS, 100, 0.0))
    for n in range(10):
        taken(limiter.take(str(n), LIMITS, 100, 50.0))
    taken(limiter.take("new", LIMITS, 100, 50.0))


def test_any_number_of_keys_takes_bounded_memory() -> None:
    limiter = RateLimiter(max_keys=50)
    for n in range(1000):
        taken(limiter.take(str(n), LIMITS, 100, 2.0 * n))
    assert len(limiter) == 50
