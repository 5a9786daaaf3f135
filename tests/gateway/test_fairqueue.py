"""The order of those who wait: priorities, shares, ageing."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.gateway.fairqueue import FairQueue


@dataclass(frozen=True, eq=False)
class Item:
    key: str = ""
    tokens: int = 1
    weight: float = 1.0
    priority: int = 0


def drain(queue: FairQueue[Item], turns: int | None = None, seconds: float = 0.0) -> list[Item]:
    """Serve `turns` items (all of them if None), `seconds` apart."""
    served: list[Item] = []
    while turns is None or len(served) < turns:
        now = seconds * len(served)
        item = queue.head(now)
        if item is None:
            break
        queue.serve(item, now)
        served.append(item)
    return served


def test_one_key_is_served_in_the_order_of_coming() -> None:
    queue: FairQueue[Item] = FairQueue()
    items = [Item(tokens=tokens) for tokens in (5, 1, 3)]
    for item in items:
        queue.push(item, 0.0)
    assert drain(queue) == items
    assert queue.head(0.0) is None


def test_a_long_backlog_does_not_delay_another_keys_first() -> None:
    queue: FairQueue[Item] = FairQueue()
    for _ in range(1000):
        queue.push(Item("many"), 0.0)
    drain(queue, 100)
    first = Item("few", tokens=500)
    queue.push(first, 0.0)
    assert first in drain(queue, 2)


def test_who_comes_later_does_not_overtake_a_head_that_waits_for_room() -> None:
    queue: FairQueue[Item] = FairQueue()
    queue.push(Item("a", tokens=10), 0.0)
    large = Item("a", tokens=1000)
    queue.push(large, 0.0)
    drain(queue, 1)
    assert queue.head(0.0) is large
    for n in range(5):
        queue.push(Item(f"new {n}"), 0.0)
    assert queue.head(0.0) is large


KEYS = ("a", "b", "c")
COSTS = st.lists(st.integers(1, 50), min_size=1, max_size=60)


@given(
    backlogs=st.tuples(COSTS, COSTS, COSTS),
    weights=st.tuples(*[st.sampled_from([0.5, 1.0, 2.0, 5.0])] * 3),
    leavers=st.sets(st.integers(0, 40)),
)
def test_keys_that_wait_get_their_shares(
    backlogs: tuple[list[int], list[int], list[int]], weights: tuple[float, float, float], leavers: set[int]
) -> None:
    """While two keys both wait, what they got by weight differs by one claim of each at most, though some leave."""
    queue: FairQueue[Item] = FairQueue()
    items = [
        Item(key, tokens, weight)
        for key, costs, weight in zip(KEYS, backlogs, weights, strict=True)
        for tokens in costs
    ]
    for item in items:
        queue.push(item, 0.0)
    for index in leavers:
        if index < len(items):
            queue.remove(items[index])
    waiting = Counter(item.key for index, item in enumerate(items) if index not in leavers)
    got = dict.fromkeys(KEYS, 0.0)
    slack = {key: max(costs) / weight for key, costs, weight in zip(KEYS, backlogs, weights, strict=True)}
    while all(waiting[key] for key in KEYS):
        (item,) = drain(queue, 1)
        waiting[item.key] -= 1
        got[item.key] += item.tokens / item.weight
        for one in KEYS:
            for other in KEYS:
                assert got[one] - got[other] <= slack[one] + slack[other] + 1e-9
    assert len(drain(queue)) == waiting.total()
    assert queue.waiting == 0


def test_a_key_that_has_had_more_does_not_forget_it_by_leaving_for_a_moment() -> None:
    queue: FairQueue[Item] = FairQueue()
    for _ in range(3):
        queue.push(Item("steady"), 0.0)
    greedy = Item("greedy", tokens=100)
    queue.push(greedy, 0.0)
    assert greedy in drain(queue, 2)
    queue.push(Item("greedy"), 0.0)
    assert [item.key for item in drain(queue)] == ["steady", "steady", "greedy"]


def test_the_higher_priority_goes_first_whoever_came_first() -> None:
    queue: FairQueue[Item] = FairQueue()
    for priority in (0, 7, -3, 7, 2):
        queue.push(Item(priority=priority), 0.0)
    assert [item.priority for item in drain(queue)] == [7, 7, 2, 0, -3]


def test_a_low_priority_has_a_turn_when_it_is_of_age() -> None:
    queue: FairQueue[Item] = FairQueue(ageing=5.0)
    for _ in range(40):
        queue.push(Item(priority=1_000_000), 0.0)
    for _ in range(40):
        queue.push(Item(priority=0), 0.0)
    turns = [item.priority for item in drain(queue, 30, seconds=1.0)]
    assert [turn for turn, priority in enumerate(turns) if priority == 0] == [5, 10, 15, 20, 25]


def test_the_highest_priority_keeps_every_second_turn_however_slow_it_goes() -> None:
    queue: FairQueue[Item] = FairQueue(ageing=5.0)
    for _ in range(20):
        queue.push(Item(priority=9), 0.0)
        for priority in range(5):
            queue.push(Item(priority=priority), 0.0)
    turns = [item.priority for item in drain(queue, 22, seconds=60.0)]
    assert turns[1::2] == [9] * 11
    assert turns[2::2] == [0, 1, 2, 3, 4] * 2


def test_the_victim_is_the_newest_of_the_heaviest_key_in_the_lowest_priority() -> None:
    queue: FairQueue[Item] = FairQueue()
    heavy = [Item("heavy") for _ in range(3)]
    rich = [Item("rich", weight=10.0) for _ in range(9)]
    for item in [*heavy, *rich, Item("heavy", priority=1)]:
        queue.push(item, 0.0)
    newcomer = Item("new")
    queue.push(newcomer, 0.0)
    assert queue.victim(newcomer) is heavy[-1]
    for item in heavy[:2]:
        queue.remove(item)
    assert queue.victim(newcomer) is newcomer, "among equals, who comes last goes"


def test_what_goes_before_counts_higher_priorities_and_a_fair_share() -> None:
    queue: FairQueue[Item] = FairQueue()
    for _ in range(100):
        queue.push(Item("many", tokens=10), 0.0)
    queue.push(Item("many", tokens=7, priority=1), 0.0)
    queue.push(Item("many", tokens=10_000, priority=-1), 0.0)
    mine = Item("few", tokens=20)
    queue.push(mine, 0.0)
    assert queue.before(mine) == 7 + 20 + 20
    last = Item("many", tokens=10)
    queue.push(last, 0.0)
    assert queue.before(last) == 7 + 100 * 10 + 20 + 10
    queue.remove(mine)
    queue.push(third := Item("third", tokens=20), 0.0)
    assert queue.before(third) == 7 + 20 + 20, "who has left has no share"


def test_keys_that_have_gone_are_forgotten() -> None:
    """Of thousands that come once only those stay that have had more than their share yet: here a hundred."""
    queue: FairQueue[Item] = FairQueue()
    for n in range(5000):
        queue.push(Item(f"once {n}"), 0.0)
        queue.push(Item("always", weight=100.0), 0.0)
        drain(queue, 1 if n < 5 else 2)
    (level,) = queue._levels.values()
    assert level.waiting == 5
    assert len(level._flows) < 300


def test_removing_a_stranger_is_an_error() -> None:
    queue: FairQueue[Item] = FairQueue()
    queue.push(Item(), 0.0)
    with pytest.raises(KeyError):
        queue.remove(Item())
