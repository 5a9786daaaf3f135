"""The CPU kernels against plain torch, over every shape of step: mixed chunks and decodes, windows, soft caps."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.base.layout import KVLayout
from baton.base.messages import Sampling
from baton.engine.attention import HeadTransform, PlainAttention, Rows, Spec, lay_out
from baton.engine.attention.cpu import CpuAttention, supports
from baton.engine.kernels import Team
from baton.engine.kv_pool import KVPool
from baton.engine.sequence import Sequence
from baton.engine.sockets import Slice

HEAD_DIM, LAYERS, TOKENS = 16, 2, 1500


@dataclass
class Bench:
    """Two equal pools, one under each attention."""

    heads: int = 6
    kv_heads: int = 2
    page_size: int = 16
    threads: int = 1
    pools: list[KVPool] = field(default_factory=list)
    pages: int = 0

    def __post_init__(self) -> None:
        torch.manual_seed(1)
        layout = KVLayout("", LAYERS, self.kv_heads, HEAD_DIM, self.page_size, "float32")
        self.pages = TOKENS // self.page_size
        content = torch.randn(self.pages, LAYERS, 2, self.kv_heads, self.page_size, HEAD_DIM)
        self.pools = [KVPool(layout, self.pages), KVPool(layout, self.pages)]
        for pool in self.pools:
            pool.pages.copy_(content)
        self.cpu = CpuAttention(self.pools[0], self.heads, Team(self.threads))
        self.plain = PlainAttention(self.pools[1], self.heads)

    def rows(self, slices: list[tuple[int, int]]) -> Rows:
        """Slices of (start, count), those of one token being decode steps, on pages in no order."""
        free = torch.randperm(self.pages).tolist()
        batch = []
        for start, count in sorted(slices, key=lambda slice: slice[1] > 1):
            prompt_len = start if count == 1 else start + count
            sequence = Sequence("", [0] * (start + count), prompt_len, Sampling(max_tokens=1))
            sequence.pages = [free.pop() for _ in range(-(-(start + count) // self.page_size))]
            batch.append(Slice(sequence, start, count, True))
        return lay_out(batch, self.page_size)

    def compare(self, slices: list[tuple[int, int]], spec: Spec, tolerance: float = 1e-5) -> None:
        rows = self.rows(slices)
        query = torch.randn(rows.count, self.heads, HEAD_DIM)
        key, value = torch.randn(2, rows.count, self.kv_heads, HEAD_DIM)
        ours = self.cpu.begin(rows).attend(spec, query, key, value)
        expected = self.plain.begin(rows).attend(spec, query, key, value)
        torch.testing.assert_close(ours, expected, atol=tolerance, rtol=tolerance)
        assert torch.equal(self.pools[0].pages, self.pools[1].pages)

    def compare_merged(self, slices: list[tuple[int, int]], spec: Spec, *, normed: bool) -> None:
        rows = self.rows(slices)
        merged = torch.randn(rows.count, (self.heads + 2 * self.kv_heads) * HEAD_DIM)
        cos, sin = torch.randn(2, 1, rows.count, HEAD_DIM)
        norms = (torch.rand(HEAD_DIM), torch.rand(HEAD_DIM)) if normed else (None, None)
        transform = HeadTransform(cos, sin, *norms, 1e-6)
        expected = self.plain.begin(rows).attend_merged(spec, merged.clone(), transform)
        ours = self.cpu.begin(rows).attend_merged(spec, merged, transform)
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(self.pools[0].pages, self.pools[1].pages, atol=1e-5, rtol=1e-5)


MIXED = [(0, 1), (130, 1), (77, 1), (0, 40), (100, 57), (200, 130), (64, 64)]


@pytest.mark.parametrize("window", [0, 1, 13, 64, 1000])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_mixed_batch(window: int, softcap: float) -> None:
    Bench().compare(MIXED, Spec(1, 0.3, window, softcap))


@pytest.mark.parametrize(("heads", "kv_heads", "page_size"), [(6, 2, 1), (6, 2, 7), (6, 6, 16), (6, 2, 64)])
def test_head_groups_and_page_sizes(heads: int, kv_heads: int, page_size: int) -> None:
    Bench(heads, kv_heads, page_size).compare(MIXED, Spec(0, 0.25))


@pytest.mark.parametrize("normed", [False, True])
def test_merged_projection_with_rotation_and_head_norms(normed: bool) -> None:
    Bench().compare_merged(MIXED, Spec(1, 0.25), normed=normed)


def test_two_threads_say_the_same_bits_as_one() -> None:
    one, two = Bench(threads=1), Bench(threads=2)
    rows = one.rows(MIXED)
    query, key = torch.randn(rows.count, 6, HEAD_DIM), torch.randn(rows.count, 2, HEAD_DIM)
    answers = [bench.cpu.begin(rows).attend(Spec(0, 0.25), query, key, key) for bench in (one, two)]
    assert torch.equal(*answers)


def test_a_row_does_not_depend_on_its_batch() -> None:
    bench = Bench()
    rows = bench.rows([(77, 1), (130, 1), (0, 40)])
    query, key = torch.randn(rows.count, 6, HEAD_DIM), torch.randn(rows.count, 2, HEAD_DIM)
    together = bench.cpu.begin(rows).attend(Spec(0, 0.25), query, key, key)
    alone = Rows(rows.positions[1:2], rows.pages[1:2], rows.starts[1:2], rows.counts[1:2], rows.first_rows[:1], 1)
    again = bench.cpu.begin(alone).attend(Spec(0, 0.25), query[1:2], key[1:2], key[1:2])
    assert torch.equal(together[1:2], again)


@pytest.mark.parametrize("window", [0, 50, 70])
def test_a_prompt_token_has_the_same_bits_in_any_chunk(window: int) -> None:
    bench, spec = Bench(), Spec(0, 0.25, window)
    rows = bench.rows([(0, 300)])
    query, key = torch.randn(rows.count, 6, HEAD_DIM), torch.randn(rows.count, 2, HEAD_DIM)
    together = bench.cpu.begin(rows).attend(spec, query, key, key)
    for first, count in ((299, 1), (0, 1), (17, 30), (130, 170), (64, 64)):
        starts, counts = np.array([first], np.int32), np.array([count], np.int32)
        alone = Rows(rows.positions[first : first + count], rows.pages, starts, counts, rows.first_rows, 0)
        some = slice(first, first + count)
        again = bench.cpu.begin(alone).attend(spec, query[some], key[some], key[some])
        assert torch.equal(together[some], again)


def test_scores_that_are_huge_stay_finite() -> None:
    Bench().compare([(50, 1), (0, 30)], Spec(0, 60.0), tolerance=1e-3)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 150), st.integers(1, 90)), min_size=1, max_size=5),
    st.integers(0, 100),
)
def test_any_batch(slices: list[tuple[int, int]], window: int) -> None:
    Bench().compare(slices, Spec(1, 0.25, window))


def test_other_pools_are_left_to_plain_attention() -> None:
    half = KVPool(KVLayout("", 1, 2, 16, 16, "bfloat16"), 1)
    odd = KVPool(KVLayout("", 1, 2, 12, 16, "float32"), 1)
    assert not supports(half, 4)
    assert not supports(odd, 4)
    assert supports(KVPool(KVLayout("", 1, 2, 16, 16, "float32"), 1), 4)
