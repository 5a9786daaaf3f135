import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.router.ask import Ask
from baton.router.split import Costs, Decision, Side, decide

COSTS = Costs(prefill_speed=1000, local_speed=500, handoff_base=0.1, handoff_per_token=0.0001)
IDLE = Side()


def decided(uncached_p: int, uncached_d: int, p: Side | None, d: Side, costs: Costs = COSTS) -> Decision:
    return decide(Ask(2000, 100), uncached_p, uncached_d, p, d, costs)


@pytest.mark.parametrize(
    ("uncached_p", "uncached_d", "p", "d", "reason"),
    [
        (1000, 1000, None, IDLE, "whole: no prefill worker"),
        (12, 12, IDLE, IDLE, "whole: 12 uncached tokens < 64"),
        (2000, 63, IDLE, Side(10**6, 100), "whole: 63 uncached tokens < 64"),
        (1000, 1000, IDLE, IDLE, "split: prefill side takes 1.20 s, decode side would take 2.00 s"),
        (
            1000,
            1000,
            Side(waiting_prompt_tokens=1000),
            IDLE,
            "split: prefill side takes 2.20 s (1.00 s queue), decode side would take 2.00 s",
        ),
        (
            1000,
            1000,
            Side(waiting_prompt_tokens=2000),
            IDLE,
            "whole: prefill side would take 3.20 s (2.00 s queue), decode side takes 2.00 s",
        ),
        (
            1000,
            1000,
            Side(waiting_prompt_tokens=1000),
            Side(running_sequences=3),
            "split: prefill side takes 2.20 s (1.00 s queue), decode side would take 2.00 s + 0.60 s harm to 3 streams",
        ),
        (
            1000,
            100,
            IDLE,
            Side(running_sequences=1),
            "whole: prefill side would take 1.11 s, decode side takes 0.20 s + 20.0 ms harm to 1 stream",
        ),
        (100, 1000, IDLE, IDLE, "split: prefill side takes 0.30 s, decode side would take 2.00 s"),
        (
            200,
            200,
            IDLE,
            Side(waiting_prompt_tokens=50),
            "split: prefill side takes 0.32 s, decode side would take 0.50 s",
        ),
        (65, 65, IDLE, IDLE, "whole: prefill side would take 0.17 s, decode side takes 0.13 s"),
    ],
)
def test_decisions(uncached_p: int, uncached_d: int, p: Side | None, d: Side, reason: str) -> None:
    decision = decided(uncached_p, uncached_d, p, d)
    assert decision.reason == reason
    assert decision.split == reason.startswith("split")


tokens = st.integers(-10, 4000)
sides = st.builds(Side, waiting_prompt_tokens=st.integers(0, 5000), running_sequences=st.integers(0, 50))


@given(tokens, tokens, sides, sides)
def test_the_cheaper_way_is_taken(uncached_p: int, uncached_d: int, p: Side, d: Side) -> None:
    decision = decided(uncached_p, uncached_d, p, d)
    assert decision.split_seconds is not None
    if not decision.threshold:
        assert decision.split == (decision.split_seconds <= 1.25 * (decision.whole_seconds + decision.harm_seconds))
    assert decision.seconds == (decision.split_seconds if decision.split else decision.whole_seconds)


@given(tokens, tokens, sides, sides, st.integers(1, 1000))
def test_more_work_on_one_side_never_speaks_for_it(uncached_p: int, uncached_d: int, p: Side, d: Side, n: int) -> None:
    if decided(uncached_p, uncached_d, p, d).split:
        assert decided(uncached_p, uncached_d, p, Side(d.waiting_prompt_tokens + n, d.running_sequences)).split
        assert decided(uncached_p, uncached_d, p, Side(d.waiting_prompt_tokens, d.running_sequences + n)).split
    else:
        assert not decided(uncached_p, uncached_d, Side(p.waiting_prompt_tokens + n), d).split


def test_no_estimate_is_longer_than_the_prompt() -> None:
    assert decided(10**6, 10**6, IDLE, IDLE) == decided(2000, 2000, IDLE, IDLE)
