"""Policies that remember: the prefix index, cache_aware and sticky."""

import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from baton.router.ask import Ask
from baton.router.policies import Policy, View, build
from baton.router.policies.cache_aware import CacheAware
from baton.router.policies.prefix_index import HOLDERS, PrefixIndex
from baton.router.policies.sticky import Sticky
from tests.router.test_policies import serve, view


def ask(prompt: bytes, salt: bytes = b"") -> Ask:
    return Ask(len(prompt) // 4, 100, prompt, salt=salt)


def noise(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


# --- the index ---------------------------------------------------------------------------------------------------


@given(common=st.integers(0, 6000), rest=st.integers(0, 6000))
def test_what_two_prompts_share_is_found_to_within_a_block(common: int, rest: int) -> None:
    index = PrefixIndex()
    index.add(ask(noise(1, common) + noise(2, rest)), "a")
    asked = ask(noise(1, common) + noise(3, rest))
    found = index.holders(asked).get("a", 0)
    assert found <= common / 4 + 1
    assert found >= (common - 256) / 4 / 1.125 - 1


def test_a_salt_keeps_worlds_apart() -> None:
    index = PrefixIndex()
    index.add(ask(noise(1, 2000), b"red"), "a")
    assert index.holders(ask(noise(1, 2000), b"red"))
    assert not index.holders(ask(noise(1, 2000), b"blue"))
    assert not index.holders(ask(noise(1, 2000)))


def test_the_index_stays_bounded_and_keeps_what_is_used() -> None:
    index = PrefixIndex(entries=1000)
    used = ask(noise(1, 1000))
    index.add(used, "w0")
    for turn in range(100_000):
        index.add(ask(b"%08d" % turn * 40), f"w{turn % 7}")
        if turn % 500 == 0:
            index.add(used, "w0")
    assert len(index) == 1000
    assert index.holders(used) == {"w0": 192}
    assert not index.holders(ask(b"%08d" % 0 * 40))
    assert index.holders(ask(b"%08d" % 99_999 * 40))


def test_ends_of_prompts_go_before_their_beginnings() -> None:
    index = PrefixIndex(entries=5)
    index.add(ask(noise(1, 1024)), "a")  # four blocks
    index.add(ask(noise(2, 512)), "a")
    assert index.holders(ask(noise(1, 1024))) == {"a": 192}


def test_a_beginning_that_all_share_does_not_hide_who_has_more() -> None:
    index, system = PrefixIndex(), noise(0, 1024)
    for worker in range(100):
        index.add(ask(system + noise(worker + 1, 1024)), f"w{worker}")
    holders = index.holders(ask(system + noise(1, 1024)))
    assert holders.pop("w0") == 512
    assert holders == {f"w{worker}": 256 for worker in range(100 - HOLDERS, 100)}


def test_whoever_is_forgotten_begins_anew() -> None:
    index, asked = PrefixIndex(), ask(noise(1, 1024))
    index.add(asked, "a")
    index.add(asked, "b")
    index.forget("a")
    index.forget("never seen")
    assert index.holders(asked) == {"b": 256}
    index.add(ask(noise(1, 512)), "a")
    assert index.holders(asked) == {"b": 256, "a": 128}


@settings(max_examples=30)
@given(data=st.data())
def test_the_index_says_what_a_plain_list_of_prompts_says(data: st.DataObject) -> None:
    """The model: every prompt every worker was sent. (Few workers: none is crowded out.)"""
    index = PrefixIndex()
    sent: dict[str, list[bytes]] = {}
    pieces = [noise(seed, 256) for seed in range(3)]
    prompts = st.lists(st.sampled_from(pieces), max_size=5).map(b"".join)
    for _ in range(data.draw(st.integers(1, 12))):
        worker, prompt = data.draw(st.sampled_from("abc")), data.draw(prompts)
        if data.draw(st.integers(0, 9)) == 0:
            index.forget(worker)
            sent.pop(worker, None)
        index.add(ask(prompt), worker)
        sent.setdefault(worker, []).append(prompt)
    asked = data.draw(prompts)
    expected = {worker: max(_common(asked, prompt) for prompt in all) for worker, all in sent.items()}
    assert index.holders(ask(asked)) == {worker: size // 4 for worker, size in expected.items() if size}


def _common(one: bytes, other: bytes) -> int:
    blocks = 0
    while one[blocks : blocks + 256] == other[blocks : blocks + 256] != b"":
        blocks += 256
    return blocks


# --- cache_aware -------------------------------------------------------------------------------------------------


def converse(policy: Policy) -> tuple[int, int, Counter[int]]:
    """40 conversations of 6 turns with 4 workers, mixed at random. Every worker computes 60 tokens between two requests
    and is charged with what it has not cached. Returns tokens computed, moves between workers, requests by worker."""
    candidates, draw, truth = view(0, 0, 0, 0), random.Random(5), PrefixIndex()
    talks = [noise(0, 1000) + noise(k + 1, 800) for k in range(40)]
    homes: dict[int, int] = {}
    computed = moves = 0
    served: Counter[int] = Counter()
    for turn in range(240):
        if turn % 40 == 0:
            order = draw.sample(range(40), 40)
        talk = order[turn % 40]
        asked = ask(talks[talk])
        index = serve(policy, asked, candidates, turn)
        tokens = asked.prompt_tokens - truth.holders(asked).get(candidates.ids[index], 0)
        truth.add(asked, candidates.ids[index])
        computed += tokens
        served[index] += 1
        moves += homes.setdefault(talk, index) != index
        homes[talk] = index
        candidates.loads[index] += tokens
        candidates.loads[:] = [max(0, load - 60) for load in candidates.loads]
        talks[talk] += noise(turn, 400)
    return computed, moves, served


def test_conversations_stay_where_they_are_and_workers_share_them() -> None:
    computed, moves, served = converse(CacheAware())
    assert moves <= 10  # of 200 further turns
    assert min(served.values()) >= 40, served
    assert computed < 0.5 * converse(build("least_loaded"))[0]


def test_a_hot_worker_loses_its_own_followers_and_nobody_elses() -> None:
    policy = build("cache_aware")
    for worker in range(4):
        policy.sent(ask(noise(worker, 4096)), f"w{worker}")
    candidates = view(50_000, 300, 200, 100)
    chosen = [policy.choose(ask(noise(worker, 4096)), candidates, 0, 0.0) for worker in range(4)]
    assert chosen == [3, 1, 2, 3]
    assert "too many" in policy.explain(ask(noise(0, 4096)), candidates, 0, 0.0)
    assert "cached" in policy.explain(ask(noise(1, 4096)), candidates, 0, 0.0)


@given(
    loads=st.lists(st.integers(0, 1500), min_size=1, max_size=8),
    sent=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 4096)), max_size=10),
    turn=st.integers(0, 20),
)
def test_nobody_is_cheaper_than_the_chosen_one(loads: list[int], sent: list[tuple[int, int]], turn: int) -> None:
    policy, candidates, asked = CacheAware(), view(*loads), ask(noise(1, 4096))
    for worker, size in sent:
        policy.sent(ask(noise(1, 4096)[:size]), f"w{worker}")
    costs = [load - policy.matched(asked, id) for id, load in zip(candidates.ids, candidates.loads, strict=True)]
    assert costs[policy.choose(asked, candidates, turn, 0.0)] == min(costs)


def test_equal_holders_take_turns() -> None:
    policy, asked = CacheAware(), ask(noise(1, 1024))
    policy.sent(asked, "w0")
    policy.sent(asked, "w2")
    assert {policy.choose(asked, view(0, 0, 0), turn, 0.0) for turn in range(4)} == {0, 2}


def test_a_worker_that_is_not_there_now_is_not_chosen() -> None:
    policy, asked = CacheAware(), ask(noise(1, 1024))
    policy.sent(asked, "w1")
    assert policy.choose(asked, View(("w0", "w2"), [5, 3]), 0, 0.0) == 1


# --- sticky ------------------------------------------------------------------------------------------------------


def keyed(key: bytes) -> Ask:
    return Ask(10, 10, key=key)


def test_a_key_stays_whatever_the_load() -> None:
    policy = Sticky()
    assert serve(policy, keyed(b"a"), view(5, 0, 5)) == 1
    assert serve(policy, keyed(b"a"), view(0, 900, 0)) == 1
    assert serve(policy, keyed(b"b"), view(0, 900, 1)) == 0
    assert serve(policy, keyed(b""), view(1, 900, 0)) == 2
    assert len(policy) == 2


def test_a_key_moves_with_its_workers_absence_and_stays_there() -> None:
    policy = Sticky()
    serve(policy, keyed(b"a"), view(5, 0, 5))
    without = View(("w0", "w2"), [3, 2])
    assert "cannot be used" in policy.explain(keyed(b"a"), without, 0, 0.0)
    assert serve(policy, keyed(b"a"), without) == 1
    assert serve(policy, keyed(b"a"), view(0, 0, 9)) == 2


def test_the_keys_of_a_lost_worker_are_assigned_anew() -> None:
    policy = Sticky()
    serve(policy, keyed(b"a"), view(0, 5))
    serve(policy, keyed(b"b"), view(5, 0))
    policy.forget("w0")
    assert policy.choose(keyed(b"a"), view(5, 0), 0, 0.0) == 1
    assert policy.choose(keyed(b"b"), view(0, 5), 0, 0.0) == 1


def test_the_longest_unused_key_goes_first() -> None:
    policy = Sticky(keys=2)
    for key in (b"a", b"b", b"a", b"c"):
        policy.sent(keyed(key), "w1")
    assert [policy.choose(keyed(key), view(0, 5), 0, 0.0) for key in (b"a", b"b", b"c")] == [1, 0, 1]


def test_an_idle_key_is_forgotten() -> None:
    policy = Sticky(idle=3)
    policy.sent(keyed(b"a"), "w1")
    for _ in range(3):
        policy.sent(keyed(b"b"), "w1")
    assert policy.choose(keyed(b"a"), view(0, 5), 0, 0.0) == 1
    policy.sent(keyed(b"b"), "w1")
    assert policy.choose(keyed(b"a"), view(0, 5), 0, 0.0) == 0
    assert len(policy) == 1
