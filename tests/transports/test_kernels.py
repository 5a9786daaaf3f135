"""One pass that copies and digests: the bytes are the bytes, the digest is the library's."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.transports.kernels import as_pieces, copy, digest
from baton.transports.region import Region

SIZE = 1 << 17


@pytest.fixture(scope="module")
def regions() -> Iterator[tuple[Region, Region]]:
    source, target = Region.create(SIZE), Region.create(SIZE)
    np.frombuffer(source.memory, np.uint8)[:] = np.random.default_rng(0).integers(0, 256, SIZE, dtype=np.uint8)
    yield source, target
    source.close()
    target.close()


LENGTHS = st.one_of(st.integers(1, 5000), st.sampled_from([240, 241, 1024, 1025, 2048, 16384]))


@settings(max_examples=150, deadline=None)
@given(st.lists(LENGTHS, min_size=1, max_size=4), st.integers(0, 200), st.integers(0, 200))
def test_copies_and_digests_like_the_library(
    regions: tuple[Region, Region], lengths: list[int], gap_here: int, gap_there: int
) -> None:
    source, target = regions
    np.frombuffer(target.memory, np.uint8)[:] = 0
    pieces, here, there = [], gap_here, gap_there
    for length in lengths:
        pieces.append((here, there, length))
        here, there = here + length + gap_here, there + length + gap_there
    got = copy(target.address, source.address, as_pieces(pieces))
    expected = bytearray(SIZE)
    for here, there, length in pieces:
        expected[there : there + length] = source.memory[here : here + length]
    assert target.memory == expected  # nothing missing, nothing beside
    assert got.tolist() == [xxhash.xxh3_64_intdigest(source.memory[h : h + n]) for h, _, n in pieces]
    back = digest(target.address, as_pieces([(there, 0, length) for _, there, length in pieces]))
    assert back.tolist() == got.tolist()


def test_one_flipped_bit_anywhere_changes_the_digest(regions: tuple[Region, Region]) -> None:
    source, _ = regions
    whole = as_pieces([(0, 0, 4096)])
    before = digest(source.address, whole)[0]
    for place in range(0, 4096, 37):
        source.memory[place] ^= 1
        assert digest(source.address, whole)[0] != before
        source.memory[place] ^= 1
    assert digest(source.address, whole)[0] == before


def test_no_pieces() -> None:
    assert digest(0, as_pieces([])).size == copy(0, 0, as_pieces([])).size == 0
