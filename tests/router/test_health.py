from hypothesis import given
from hypothesis import strategies as st

from baton.router import health
from baton.router.health import CLOSED, Breaker, Limits, RetryBudget

LIMITS = Limits(failures=3, cooldown=1.0, longest=8.0)


def fail(breaker: Breaker, now: float, times: int = 1) -> Breaker:
    for _ in range(times):
        breaker = health.failed(breaker, now, LIMITS)
    return breaker


def test_opens_after_failures_in_a_row_and_closes_with_a_success() -> None:
    breaker = fail(CLOSED, 10.0, 2)
    assert health.state(breaker, 10.0) == "closed"
    assert health.succeeded(breaker) == CLOSED
    breaker = fail(breaker, 10.0)
    assert health.state(breaker, 10.0) == "open"
    assert not health.allows(breaker, 10.9)
    assert health.state(breaker, 11.0) == "half_open"
    assert health.allows(breaker, 11.0)


def test_half_open_admits_one_trial_at_a_time() -> None:
    breaker = health.tried(fail(CLOSED, 0.0, 3), 1.0, LIMITS)
    assert not health.allows(breaker, 1.5)
    assert health.allows(breaker, 2.0)  # the first trial never ended: another one


def test_a_failed_trial_doubles_the_cooldown_up_to_the_longest() -> None:
    breaker, now, waits = fail(CLOSED, 0.0, 3), 0.0, []
    for _ in range(6):
        waits.append(breaker.until - now)
        now = breaker.until
        breaker = fail(health.tried(breaker, now, LIMITS), now)
    assert waits == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0]


def test_a_hundred_requests_failing_together_open_it_once() -> None:
    assert fail(CLOSED, 0.0, 100).until == 1.0


@given(st.lists(st.tuples(st.sampled_from("fst"), st.floats(0, 3)), max_size=40))
def test_any_history_ends_usable_after_the_longest_cooldown(history: list[tuple[str, float]]) -> None:
    breaker, now = CLOSED, 0.0
    for event, seconds in history:
        now += seconds
        if event == "f":
            breaker = health.failed(breaker, now, LIMITS)
        elif event == "s":
            breaker = health.succeeded(breaker)
        else:
            breaker = health.tried(breaker, now, LIMITS)
        assert breaker.opened == 0 or breaker.until <= now + LIMITS.longest
    assert health.allows(breaker, now + LIMITS.longest)


def test_the_budget_of_second_attempts() -> None:
    budget = RetryBudget(burst=4, share=0.5)
    assert [budget.spend() for _ in range(6)] == [True] * 4 + [False] * 2
    budget.earn()
    assert not budget.spend()
    budget.earn()
    assert [budget.spend(), budget.spend()] == [True, False]
    for _ in range(1000):
        budget.earn()
    assert [budget.spend() for _ in range(5)] == [True] * 4 + [False]
