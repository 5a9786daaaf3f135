"""Which workers have computed which prefixes, as a guess from what was sent there.

A prompt's bytes are cut into blocks, and a block's hash covers everything before it (it seeds the next one), so equal
hashes mean equal prefixes. A map leads from a hash to the workers that were sent it. Everything is bounded: the number
of hashes (the longest unused goes first, ends of prompts before their beginnings), the workers per hash, the bytes
looked at.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from itertools import count

import xxhash

from baton.router.ask import Ask

SMALLEST_BLOCK = 256
"""Bytes, about 64 tokens: what is less is not worth a detour."""
LONGEST_PREFIX = 1 << 20
"""Bytes looked at."""
HOLDERS = 16
"""Workers remembered per block, the latest: a beginning that all prompts share need not name everybody."""

Cut = tuple[int, int]
"""Where a block begins and ends."""


def _cuts() -> tuple[Cut, ...]:
    """Blocks grow with their distance from the beginning, by an eighth of it: a prompt of 12 kB has 23, one of a
    megabyte 61, and an unfinished last block is at most an eighth of what lies before it."""
    cuts, start = [], 0
    while start < LONGEST_PREFIX:
        end = start + max(SMALLEST_BLOCK, start >> 3)
        cuts.append((start, end))
        start = end
    return tuple(cuts)


CUTS = _cuts()
_ENDS = tuple(end for _, end in CUTS)


class PrefixIndex:
    """`entries`: how many block hashes are kept; one takes about 200 bytes."""

    __slots__ = ("_ask", "_blocks", "_chain", "_entries", "_holders", "_names", "_numbers")

    def __init__(self, entries: int = 1 << 17) -> None:
        self._entries = entries
        self._blocks: OrderedDict[int, tuple[int, ...]] = OrderedDict()
        """Block hash to the numbers of its holders, the latest last. Neighbours with equal holders share one tuple."""
        self._holders: dict[str, int] = {}
        """A worker's number. Who is forgotten gets a new one, and the old number means nobody."""
        self._names: dict[int, str] = {}
        self._numbers = count()
        self._ask: Ask | None = None
        self._chain: list[int] = []
        """Block hashes of the last request seen: it is looked up, and then sent."""

    def __len__(self) -> int:
        return len(self._blocks)

    def holders(self, ask: Ask) -> dict[str, int]:
        """Workers that have a beginning of the prompt, with its length in tokens, the longest first."""
        found: list[tuple[int, ...]] = []
        get = self._blocks.get
        for block in self._hashes(ask):
            entry = get(block)
            if entry is None:
                break
            found.append(entry)
        lengths: dict[str, int] = {}
        seen: tuple[int, ...] = ()
        for depth in range(len(found) - 1, -1, -1):  # whoever has a block has all before it
            entry = found[depth]
            if entry is seen:
                continue
            seen = entry
            for number in entry:
                name = self._names.get(number)
                if name is not None and name not in lengths:
                    lengths[name] = ask.prompt_tokens * _ENDS[depth] // len(ask.prompt)
        return lengths

    def add(self, ask: Ask, id: str) -> None:
        """`id` computes this prompt now."""
        number = self._number(id)
        blocks = self._blocks
        before: tuple[int, ...] | None = None
        after: tuple[int, ...] = (number,)
        for block in reversed(list(self._hashes(ask))):  # the beginning last: it is the last to go
            holders = blocks.get(block, ())
            if holders is not before:
                before, after = holders, _with(holders, number)
            blocks[block] = after
            blocks.move_to_end(block)
        while len(blocks) > self._entries:
            blocks.popitem(last=False)

    def forget(self, id: str) -> None:
        """Its cache is empty. What the blocks say of it means nobody from now on, and is crowded out."""
        number = self._holders.pop(id, None)
        if number is not None:
            del self._names[number]

    def _number(self, id: str) -> int:
        number = self._holders.get(id)
        if number is None:
            number = self._holders[id] = next(self._numbers)
            self._names[number] = id
        return number

    def _hashes(self, ask: Ask) -> Iterator[int]:
        """Block hashes from the beginning on, computed as far as somebody asks and remembered for the next who does."""
        if ask is not self._ask:
            self._ask, self._chain = ask, []
        chain, prompt, digest = self._chain, ask.prompt, xxhash.xxh3_64_intdigest
        yield from chain
        if chain:
            seed = chain[-1]
        else:
            seed = digest(ask.salt) if ask.salt else 0
        for start, end in CUTS[len(chain) : bisect_right(_ENDS, len(prompt))]:
            seed = digest(prompt[start:end], seed)
            chain.append(seed)
            yield seed


def _with(holders: tuple[int, ...], number: int) -> tuple[int, ...]:
    """`number` as the latest of `holders`."""
    if holders and holders[-1] == number:
        return holders
    return (*[other for other in holders if other != number][-(HOLDERS - 1) :], number)
