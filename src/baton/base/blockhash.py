"""One chained content hash for the prefix cache, the KV store and routing.

The hash of a full page covers its tokens and, through its parent, everything before it: equal hashes mean equal
prefixes. xxh3-128 is fast (0.14 us for 64 tokens) and does not depend on the process (PYTHONHASHSEED).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import xxhash

BlockHash = bytes
"""16 bytes."""


def root(namespace: str = "") -> BlockHash:
    """The parent of the first page; `namespace` (weights version, tenant salt) keeps worlds apart."""
    return xxhash.xxh3_128_digest(namespace.encode())


def chain(parent: BlockHash, tokens: Sequence[int]) -> BlockHash:
    """Hash of one full page: its parent's hash followed by its token ids as little-endian 32-bit integers."""
    return xxhash.xxh3_128_digest(parent + array("i", tokens).tobytes())


def page_hashes(tokens: Sequence[int], page_size: int, parent: BlockHash | None = None) -> list[BlockHash]:
    """Hashes of all full pages of `tokens` (a partial last page has none)."""
    current = root() if parent is None else parent
    hashes = []
    for start in range(0, len(tokens) - page_size + 1, page_size):
        current = chain(current, tokens[start : start + page_size])
        hashes.append(current)
    return hashes
