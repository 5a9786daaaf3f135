"""Pages: a free list, reference counts and the prefix index.

A page is in exactly one place: *used* (reference count > 0), or *free*. A free page may still hold a prefix that
somebody can hit (*cached*); free pages are taken in the order they were given back, so that the least recently used
prefixes go first, and of one sequence its last pages before its first ones (a parent outlives its children).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from baton.base.blockhash import BlockHash


class OutOfPages(Exception):
    """Fewer free pages than asked for; nothing was taken."""


class PagePool:
    """Which pages are whose. Page ids are 0 .. total - 1. Pure bookkeeping: no memory is touched."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(total))
        self._users = [0] * total
        self._page_of: dict[BlockHash, int] = {}
        self._hash_of: dict[int, BlockHash] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def cached(self) -> int:
        """Free pages that still hold a prefix."""
        return sum(1 for page in self._hash_of if self._users[page] == 0)

    @property
    def users(self) -> int:
        """Uses of all pages; a shared page counts for each of its users."""
        return sum(self._users)

    def take(self, count: int) -> list[int]:
        """`count` pages with one user each, their old content forgotten. Raises `OutOfPages`."""
        if count > len(self._free):
            raise OutOfPages
        pages = []
        for _ in range(count):
            page, _ = self._free.popitem(last=False)
            self._forget(page)
            self._users[page] = 1
            pages.append(page)
        return pages

    def match(self, hashes: Iterable[BlockHash]) -> list[int]:
        """Pages that hold the longest known prefix of `hashes`. Reads only; `share` them before anything else."""
        pages = []
        for hash in hashes:
            page = self._page_of.get(hash)
            if page is None:
                break
            pages.append(page)
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """One more user for each of `pages` (from `match`)."""
        for page in pages:
            if self._users[page] == 0:
                del self._free[page]
            self._users[page] += 1

    def idle(self, pages: Iterable[int]) -> int:
        """How many of `pages` (from `match`) are free, that is would count against `free` if shared."""
        return sum(1 for page in pages if self._users[page] == 0)

    def publish(self, page: int, hash: BlockHash) -> None:
        """The page's content is complete: let others hit it. A prefix that is known already keeps its page."""
        if hash not in self._page_of and page not in self._hash_of:
            self._page_of[hash] = page
            self._hash_of[page] = hash

    def give_back(self, pages: Sequence[int]) -> None:
        """One user less for each; called with a sequence's pages in order, so that its first ones live longest."""
        for page in reversed(pages):
            assert self._users[page] > 0, f"page {page} was given back twice"
            self._users[page] -= 1
            if self._users[page] == 0:
                self._free[page] = None
                if page not in self._hash_of:
                    self._free.move_to_end(page, last=False)

    def forget_all(self) -> int:
        """Empty the prefix index (pages in use stay with their users). Returns how many prefixes were dropped."""
        dropped = len(self._page_of)
        self._page_of.clear()
        self._hash_of.clear()
        return dropped

    def check(self) -> None:
        """The audit: every page is free or used, never both; the index is a bijection. Raises AssertionError."""
        for page, users in enumerate(self._users):
            assert (users == 0) == (page in self._free), (
                f"page {page} has {users} users, in free list: {page in self._free}"
            )
        assert {h: p for p, h in self._hash_of.items()} == self._page_of, "prefix index is not a bijection"

    def _forget(self, page: int) -> None:
        hash = self._hash_of.pop(page, None)
        if hash is not None:
            del self._page_of[hash]

    def __repr__(self) -> str:
        return f"<PagePool {self.free} of {self.total} free, {self.cached} cached>"
