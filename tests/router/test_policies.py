import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.base import config
from baton.base.errors import ConfigError
from baton.router.ask import Ask
from baton.router.policies import BUILDERS, Policy, View, build, decode_turn
from baton.router.policies.base import lightest
from baton.router.policies.bucket import PERIOD, Bucket
from baton.router.policies.consistent_hash import POINTS, Ring
from baton.router.policies.simple import PowerOfTwo

loads = st.lists(st.integers(0, 1000), min_size=1, max_size=20)
draws = st.floats(0, 1, exclude_max=True)
asks = st.builds(
    Ask,
    prompt_tokens=st.integers(0, 2000),
    max_tokens=st.integers(1, 500),
    prompt=st.integers(0, 3).flatmap(lambda seed: st.integers(0, 4000).map(lambda size: bytes([seed]) * size)),
    key=st.sampled_from([b"", b"a", b"b"]),
    salt=st.sampled_from([b"", b"tenant"]),
)


def view(*loads: int) -> View:
    return View(tuple(f"w{i}" for i in range(len(loads))), list(loads))


def serve(policy: Policy, ask: Ask, view: View, turn: int = 0, draw: float = 0.0) -> int:
    """Choose, send and learn."""
    index = policy.choose(ask, view, turn, draw)
    policy.sent(ask, view.ids[index])
    return index


@pytest.mark.parametrize("name", sorted(BUILDERS))
@settings(max_examples=40)
@given(
    loads=loads,
    history=st.lists(asks, max_size=8),
    ask=asks,
    turn=st.integers(0, 10**9),
    draw=draws,
    gone=st.booleans(),
)
def test_every_policy_names_a_candidate_always_the_same_one_and_explains_it(
    name: str, loads: list[int], history: list[Ask], ask: Ask, turn: int, draw: float, gone: bool
) -> None:
    policy, candidates = build(name), view(*loads)
    for earlier in history:
        serve(policy, earlier, candidates, turn, draw)
    if gone:
        policy.forget("w0")
        assert policy.matched(ask, "w0") == 0
    choice = policy.choose(ask, candidates, turn, draw)
    assert 0 <= choice < len(loads)
    assert choice == policy.choose(ask, View(tuple(candidates.ids), list(loads)), turn, draw)
    assert candidates.ids[choice] in policy.explain(ask, candidates, turn, draw)
    assert 0 <= policy.matched(ask, candidates.ids[choice]) <= ask.prompt_tokens


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_equal_histories_make_equal_choices(name: str) -> None:
    def run() -> list[int]:
        policy, candidates, draw = build(name), view(0, 0, 0, 0, 0), random.Random(7)
        chosen = []
        for turn in range(600):
            ask = Ask(draw.randrange(1, 3000), 10, draw.randbytes(2) * 600, key=draw.randbytes(1))
            chosen.append(serve(policy, ask, candidates, turn, draw.random()))
            candidates.loads[chosen[-1]] += ask.prompt_tokens
        return chosen

    assert run() == run()


def test_an_unknown_policy_is_told_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"cache_aware.*least_loaded.*did you mean"):
        build("least_loded")


def test_the_configuration_offers_what_there_is() -> None:
    assert set(config.POLICIES) == set(BUILDERS)


@given(loads=loads, turn=st.integers(0, 100))
def test_the_lightest_is_the_lightest(loads: list[int], turn: int) -> None:
    assert loads[lightest(loads, turn)] == min(loads)


def test_the_lightest_take_turns() -> None:
    assert [lightest([5, 0, 0], turn) for turn in range(6)] == [1, 1, 2, 1, 1, 2]


@pytest.mark.parametrize("prefills", range(1, 6))
@pytest.mark.parametrize("decodes", range(1, 6))
def test_round_robin_uses_every_pair_equally(prefills: int, decodes: int) -> None:
    pairs = Counter(
        (turn % prefills, decode_turn(turn, prefills, decodes) % decodes) for turn in range(prefills * decodes * 5)
    )
    assert len(pairs) == prefills * decodes
    assert set(pairs.values()) == {5}


# --- power of two ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 7])
def test_power_of_two_draws_every_pair_of_different_workers_equally(n: int) -> None:
    drawn = Counter(PowerOfTwo._drawn(n, (k + 0.5) / (n * (n - 1) * 4)) for k in range(n * (n - 1) * 4))
    assert set(drawn) == {(a, b) for a in range(n) for b in range(n) if a != b}
    assert set(drawn.values()) == {4}


def test_power_of_two_never_takes_the_most_loaded() -> None:
    candidates = view(1, 9, 3)
    chosen = {build("power_of_two").choose(Ask(1, 1), candidates, 0, k / 100) for k in range(100)}
    assert chosen == {0, 2}


# --- consistent hash ---------------------------------------------------------------------------------------------


def owners(policy: Policy, candidates: View) -> list[str]:
    return [candidates.ids[policy.choose(Ask(1, 1, key=b"key %d" % k), candidates, 0, 0.0)] for k in range(4000)]


@pytest.mark.parametrize("workers", [1, 2, 5, 11])
def test_a_worker_that_comes_or_goes_moves_its_share_of_keys_only(workers: int) -> None:
    policy, before, after = build("consistent_hash"), view(*[0] * workers), view(*[0] * (workers + 1))
    old, new = owners(policy, before), owners(policy, after)
    moved = [now for was, now in zip(old, new, strict=True) if was != now]
    assert set(moved) == {f"w{workers}"}  # nobody moves between those that stay
    assert len(moved) < 4000 / (workers + 1) * 1.5
    assert owners(policy, before) == old  # and all go back
    policy.forget(f"w{workers}")
    assert owners(policy, before) == old
    assert owners(build("consistent_hash"), after) == new  # whatever the order they came in


def test_keys_are_shared_evenly() -> None:
    shares = Counter(owners(build("consistent_hash"), view(*[0] * 8)))
    assert min(shares.values()) > 500 * 0.7
    assert max(shares.values()) < 500 * 1.4


def test_a_forgotten_worker_that_is_still_there_keeps_its_keys() -> None:
    policy, candidates = build("consistent_hash"), view(0, 0, 0)
    old = owners(policy, candidates)
    policy.forget("w1")
    assert owners(policy, candidates) == old


def test_who_is_forgotten_leaves_nothing_on_the_ring() -> None:
    ring = Ring()
    ring.add(["a", "b"])
    ring.remove("a")
    ring.remove("never seen")
    assert Counter(ring.walk(0)) == {"b": POINTS}


def test_the_sets_of_several_models_do_not_mix() -> None:
    policy = build("consistent_hash")
    one, other = View(("a", "b", "c"), [0, 0, 0]), View(("x", "y"), [0, 0])
    old = owners(policy, one), owners(policy, other)
    assert (owners(build("consistent_hash"), one), owners(build("consistent_hash"), other)) == old
    policy.forget("x")
    assert (owners(policy, one), owners(policy, other)) == old


def test_the_ring_passes_over_who_is_overloaded() -> None:
    policy, ask = build("consistent_hash"), Ask(10, 1, key=b"k")
    home = policy.choose(ask, view(0, 0, 0, 0), 0, 0.0)
    loads = [100] * 4
    loads[home] = 100 + 10
    assert policy.choose(ask, view(*loads), 0, 0.0) == home  # within a quarter above the mean
    loads[home] = 1000
    assert policy.choose(ask, view(*loads), 0, 0.0) != home
    assert f"after w{home}, overloaded" in policy.explain(ask, view(*loads), 0, 0.0)


def test_without_a_key_the_beginning_of_the_prompt_counts_and_without_both_the_load() -> None:
    policy, candidates = build("consistent_hash"), view(0, 0, 0, 0, 0, 0, 0, 0)
    begin = random.Random(1).randbytes(1024)
    chosen = {policy.choose(Ask(300, 1, begin + b"%d" % k), candidates, k, 0.0) for k in range(20)}
    assert len(chosen) == 1
    assert len({policy.choose(Ask(300, 1, b"%d" % k + begin), candidates, k, 0.0) for k in range(20)}) > 2
    assert policy.choose(Ask(300, 1), view(5, 5, 4, 5), 0, 0.0) == 2


# --- bucket ------------------------------------------------------------------------------------------------------


def test_buckets_get_equal_shares_of_tokens_and_order_prompts_by_length() -> None:
    policy, candidates, draw = Bucket(), view(0, 0, 0, 0), random.Random(3)
    lengths = [int(draw.paretovariate(1.2) * 50) % 20_000 + 1 for _ in range(4000)]
    tokens: Counter[int] = Counter()
    reach: dict[int, tuple[int, int]] = {}
    for turn, length in enumerate(lengths):
        index = serve(policy, Ask(length, 1), candidates, turn)
        if turn >= 2000:  # boundaries stand
            tokens[index] += length
            low, high = reach.get(index, (length, length))
            reach[index] = (min(low, length), max(high, length))
    mean = sum(tokens.values()) / 4
    assert all(0.6 * mean < tokens[index] < 1.4 * mean for index in range(4)), tokens
    assert all(reach[i][0] < reach[i + 1][0] and reach[i][1] < reach[i + 1][1] for i in range(3))


def test_boundaries_follow_the_traffic() -> None:
    policy, candidates = Bucket(), view(0, 0)
    for length in (10, 1000):
        for turn in range(10 * PERIOD):
            serve(policy, Ask(length + turn % 10, 1), candidates, turn)
        assert [policy.choose(Ask(n, 1), candidates, 0, 0.0) for n in (length, length + 9)] == [0, 1]


def test_prompts_of_one_length_are_shared_by_load() -> None:
    policy = Bucket()
    for turn in range(PERIOD):
        serve(policy, Ask(100, 1), view(0, 0, 0), turn)
    assert policy.choose(Ask(100, 1), view(7, 5, 9), 0, 0.0) == 1
    assert policy.choose(Ask(99, 1), view(7, 5, 9), 0, 0.0) == 0
    assert policy.choose(Ask(101, 1), view(7, 5, 9), 0, 0.0) == 2


def test_an_overloaded_bucket_hands_on() -> None:
    policy = Bucket()
    for turn in range(PERIOD):
        serve(policy, Ask(100, 1), view(0, 0), turn)
    assert policy.choose(Ask(50, 1), view(500, 480), 0, 0.0) == 0
    assert policy.choose(Ask(50, 1), view(900, 300), 0, 0.0) == 1
    assert "overloaded" in policy.explain(Ask(50, 1), view(900, 300), 0, 0.0)
