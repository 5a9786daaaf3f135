from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.base.errors import ConfigError
from baton.router import policies
from baton.router.policies import POLICIES

loads = st.lists(st.integers(0, 1000), min_size=1, max_size=20)


@pytest.mark.parametrize("name", sorted(POLICIES))
@given(loads=loads, turn=st.integers(0, 10**9), draw=st.floats(0, 1, exclude_max=True))
def test_every_policy_names_a_candidate_and_always_the_same_one(
    name: str, loads: list[int], turn: int, draw: float
) -> None:
    choice = policies.policy(name)(loads, turn, draw)
    assert 0 <= choice < len(loads)
    assert choice == policies.policy(name)(list(loads), turn, draw)


@given(loads=loads, turn=st.integers(0, 100))
def test_least_loaded_is_least_loaded(loads: list[int], turn: int) -> None:
    assert loads[policies.least_loaded(loads, turn, 0.0)] == min(loads)


def test_least_loaded_takes_turns_among_equals() -> None:
    assert {policies.least_loaded([5, 0, 0], turn, 0.0) for turn in range(3)} == {1, 2}


@pytest.mark.parametrize(("prefills", "decodes"), [(1, 1), (2, 2), (2, 3), (2, 4), (3, 6), (4, 4)])
def test_round_robin_uses_every_pair_equally(prefills: int, decodes: int) -> None:
    pairs: Counter[tuple[int, int]] = Counter()
    for turn in range(prefills * decodes * 5):
        shifted = policies.decode_turn(turn, prefills, decodes)
        pairs[policies.round_robin([0] * prefills, turn, 0.0), policies.round_robin([0] * decodes, shifted, 0.0)] += 1
    assert len(pairs) == prefills * decodes
    assert set(pairs.values()) == {5}


def test_an_unknown_policy_is_told_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"least_loaded.*did you mean"):
        policies.policy("least_loded")
