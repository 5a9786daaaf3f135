"""The page pool against a model of it that is slow and obvious."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from baton.base.blockhash import chain, page_hashes, root
from baton.engine.blocks import OutOfPages, PagePool

TOTAL = 7
HASHES = page_hashes(list(range(6)), 1)


class PoolMachine(RuleBasedStateMachine):
    """Holders take, share, publish and give back; the model knows each page's users, hash and time of release."""

    holdings = Bundle("holdings")

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(TOTAL)
        self.users = dict.fromkeys(range(TOTAL), 0)
        self.hashes: dict[int, bytes] = {}
        self.order = list(range(TOTAL))

    @rule(target=holdings, count=st.integers(0, TOTAL + 1))
    def take(self, count: int) -> object:
        if count > len(self.order):
            with pytest.raises(OutOfPages):
                self.pool.take(count)
            return multiple()
        pages = self.pool.take(count)
        assert pages == self.order[:count], "free pages go out in the order of their release, the empty ones first"
        del self.order[:count]
        for page in pages:
            self.users[page] = 1
            self.hashes.pop(page, None)
        return pages

    @rule(target=holdings, count=st.integers(0, len(HASHES)))
    def hit(self, count: int) -> object:
        pages = self.pool.match(HASHES[:count])
        known = {hash: page for page, hash in self.hashes.items()}
        expected = []
        for hash in HASHES[:count]:
            if hash not in known:
                break
            expected.append(known[hash])
        assert pages == expected
        assert self.pool.idle(pages) == sum(1 for page in pages if not self.users[page])
        self.pool.share(pages)
        for page in pages:
            self.users[page] += 1
            if page in self.order:
                self.order.remove(page)
        return pages

    @rule(pages=holdings, which=st.integers(0, TOTAL), hash=st.sampled_from(HASHES))
    def publish(self, pages: list[int], which: int, hash: bytes) -> None:
        if which < len(pages):
            page = pages[which]
            self.pool.publish(page, hash)
            if page not in self.hashes and hash not in self.hashes.values():
                self.hashes[page] = hash

    @rule(pages=consumes(holdings))
    def give_back(self, pages: list[int]) -> None:
        self.pool.give_back(pages)
        for page in reversed(pages):
            self.users[page] -= 1
            if not self.users[page]:
                self.order.insert(len(self.order) if page in self.hashes else 0, page)

    @rule()
    def forget_all(self) -> None:
        assert self.pool.forget_all() == len(self.hashes)
        self.hashes.clear()

    @invariant()
    def audit(self) -> None:
        self.pool.check()
        assert self.pool.free == len(self.order)
        assert self.pool.users == sum(self.users.values())
        assert self.pool.cached == sum(1 for page in self.hashes if not self.users[page])


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_giving_back_twice_is_noticed() -> None:
    pool = PagePool(2)
    pages = pool.take(1)
    pool.give_back(pages)
    with pytest.raises(AssertionError, match="given back twice"):
        pool.give_back(pages)


def test_of_one_sequence_the_last_pages_are_lost_first() -> None:
    """A prefix without its first page is of no use to anybody."""
    pool = PagePool(4)
    pages = pool.take(4)
    for page, hash in zip(pages, HASHES, strict=False):
        pool.publish(page, hash)
    pool.give_back(pages)
    pool.take(1)
    assert pool.match(HASHES) == pages[:3]
    assert repr(pool) == "<PagePool 3 of 4 free, 3 cached>"


def test_pages_without_a_prefix_are_taken_before_any_cached_one() -> None:
    pool = PagePool(3)
    first, second, third = pool.take(3)
    pool.publish(second, HASHES[0])
    pool.give_back([second])
    pool.give_back([first, third])
    assert pool.take(2) == [first, third]
    assert pool.match(HASHES) == [second]


def test_a_hash_covers_everything_before_it() -> None:
    assert page_hashes([1, 2, 3, 4, 5], 2) == [
        chain(root(), [1, 2]),
        chain(chain(root(), [1, 2]), [3, 4]),
    ]
    assert page_hashes([9, 2, 3, 4], 2)[1] != page_hashes([1, 2, 3, 4], 2)[1]
