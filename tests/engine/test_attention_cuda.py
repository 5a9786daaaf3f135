"""The Triton kernels against plain torch: on a GPU where there is one, else in Triton's interpreter (tests/conftest.py
chooses it); skipped where Triton is not installed."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from baton.engine.attention import PlainAttention, Spec
from baton.engine.attention.cuda import CudaAttention
from baton.engine.attention.graphs import bucket

from .test_attention import Bench

SLICES = [(0, 1), (130, 1), (77, 1), (0, 40), (100, 57)]


def bench() -> Bench:
    one = Bench()
    if torch.cuda.is_available():
        torch.set_default_device("cuda")
        for pool in one.pools:
            pool.pages = pool.pages.cuda()
    one.cpu = CudaAttention(one.pools[0], one.heads)  # type: ignore[assignment]
    one.plain = PlainAttention(one.pools[1], one.heads)
    return one


@pytest.fixture(autouse=True)
def default_device() -> object:
    yield
    torch.set_default_device("cpu")


@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (13, 0.0), (0, 3.0), (64, 3.0)])
def test_mixed_batch(window: int, softcap: float) -> None:
    bench().compare(SLICES, Spec(1, 0.3, window, softcap))


def test_merged_projection() -> None:
    bench().compare_merged(SLICES, Spec(1, 0.3), normed=True)


def test_buckets() -> None:
    assert [bucket(rows) for rows in (1, 2, 3, 5, 16, 17, 33, 48)] == [1, 2, 4, 8, 16, 32, 48, 48]
