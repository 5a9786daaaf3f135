import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.router.speeds import HALF_LIFE, Speeds


def test_before_anything_is_measured_there_are_speeds() -> None:
    costs = Speeds().costs()
    assert costs.prefill_speed == pytest.approx(4000)
    assert costs.local_speed == costs.prefill_speed
    assert 0 < costs.handoff_base < 0.1
    assert 1 <= Speeds().retry_after(0) <= 60


@pytest.mark.parametrize("true", [30.0, 4000.0, 500_000.0])
def test_a_speed_far_from_the_start_is_learned_in_a_few_requests(true: float) -> None:
    speeds = Speeds()
    for now in range(20):
        speeds.prefilled(1000, 1000 / true, now)
    assert speeds.costs().prefill_speed == pytest.approx(true, rel=0.3)


def test_who_was_never_measured_is_as_fast_as_the_other() -> None:
    one, other = Speeds(), Speeds()
    for now in range(20):
        one.prefilled(1000, 5.0, now)
        other.prefilled_locally(1000, 5.0, now)
    for speeds in (one, other):
        assert speeds.costs().local_speed == speeds.costs().prefill_speed == pytest.approx(200, rel=0.1)


def test_a_change_is_followed_and_an_old_speed_fades() -> None:
    speeds = Speeds()
    for now in range(100):
        speeds.prefilled(1000, 1.0, now)
    for now in range(100, 100 + int(4 * HALF_LIFE)):
        speeds.prefilled(1000, 2.0, now)
    assert speeds.costs().prefill_speed == pytest.approx(500, rel=0.1)


def test_one_request_that_hung_moves_little() -> None:
    speeds = Speeds()
    for now in range(60):
        speeds.prefilled(1000, 1.0, now)
        speeds.handed_off(500 + now, 0.01, now)
    before = speeds.costs()
    speeds.prefilled(1000, 3600.0, 60)
    speeds.handed_off(500, 3600.0, 60)
    after = speeds.costs()
    assert after.prefill_speed > 0.8 * before.prefill_speed
    assert _handoff(after.handoff_base, after.handoff_per_token, 500) < 0.013


@pytest.mark.parametrize("nonsense", [0.0, -1.0, math.nan, math.inf])
def test_what_cannot_be_is_ignored(nonsense: float) -> None:
    speeds = Speeds()
    speeds.prefilled(1000, nonsense, 0)
    speeds.prefilled_locally(1000, nonsense, 0)
    speeds.handed_off(1000, nonsense, 0)
    speeds.decoded(1000, nonsense, 0)
    speeds.prefilled(-5, 1.0, 0)
    speeds.handed_off(0, 1.0, 0)
    speeds.decoded(0, 1.0, 0)
    assert speeds.costs() == Speeds().costs()
    assert speeds.duration(1.0, 10**6) == Speeds().duration(1.0, 10**6)


def test_a_short_prompt_does_not_speak_for_long_ones() -> None:
    speeds = Speeds()
    for now in range(100):
        speeds.prefilled(1000, 1.0, now)
    for now in range(100, 1000):
        speeds.prefilled(2, 0.02, now)
    assert speeds.costs().prefill_speed == pytest.approx(1000, rel=0.01)


def test_what_was_known_is_still_known_after_a_long_pause() -> None:
    speeds = Speeds()
    for now in range(50):
        speeds.prefilled(1000, 10.0, now)
    speeds.prefilled(1000, 20.0, 1e7)
    assert 65 < speeds.costs().prefill_speed < 80


def test_a_clock_that_goes_backwards_stands_still() -> None:
    one, other = Speeds(), Speeds()
    for backwards, standing in ((100, 100), (0, 100), (100, 100)):
        one.prefilled(1000, 10.0 + backwards, backwards)
        other.prefilled(1000, 10.0 + backwards, standing)
    assert one.costs() == other.costs()


def test_the_base_and_the_slope_of_a_handoff_are_told_apart() -> None:
    speeds, draw = Speeds(), random.Random(1)
    for now in range(200):
        size = draw.randrange(50, 4000)
        speeds.handed_off(size, (0.03 + size * 1e-4) * draw.uniform(0.9, 1.1), now)
    costs = speeds.costs()
    assert costs.handoff_base == pytest.approx(0.03, abs=0.015)
    assert costs.handoff_per_token == pytest.approx(1e-4, rel=0.1)


def test_handoffs_of_one_size_keep_the_shape_of_the_start() -> None:
    speeds = Speeds()
    for now in range(100):
        speeds.handed_off(1000, 0.5, now)
    costs = speeds.costs()
    assert _handoff(costs.handoff_base, costs.handoff_per_token, 1000) == pytest.approx(0.5, rel=0.05)
    assert costs.handoff_base == pytest.approx(0.25, rel=0.02)


@given(
    st.lists(
        st.tuples(st.integers(-1, 10**6), st.floats(allow_nan=True, allow_infinity=True), st.floats(-10, 1e6)),
        max_size=60,
    )
)
def test_whatever_is_seen_the_estimates_can_be_used(seen: list[tuple[int, float, float]]) -> None:
    speeds = Speeds()
    for tokens, seconds, now in seen:
        speeds.prefilled(tokens, seconds, now)
        speeds.handed_off(tokens, seconds, now)
        speeds.decoded(tokens, seconds, now)
    costs = speeds.costs()
    assert 0 < costs.prefill_speed < math.inf
    assert 0 <= costs.handoff_base < math.inf
    assert 0 <= costs.handoff_per_token < math.inf
    assert 1 <= speeds.retry_after(1) <= 60


def test_durations_and_retry_after_follow_answers() -> None:
    speeds = Speeds()
    for now in range(200):
        speeds.prefilled(1000, 2.0, now)
        speeds.decoded(100, 10.0, now)
    assert speeds.duration(1.0, 10_000) == pytest.approx(11, rel=0.05)  # nobody writes 10,000 tokens here
    assert speeds.duration(1.0, 10) == pytest.approx(2.0, rel=0.05)
    assert speeds.retry_after(1) == pytest.approx(12, rel=0.1)
    assert speeds.retry_after(4) == pytest.approx(3, rel=0.1)
    assert speeds.retry_after(1000) == 1.0


def _handoff(base: float, per_token: float, tokens: int) -> float:
    return base + per_token * tokens
