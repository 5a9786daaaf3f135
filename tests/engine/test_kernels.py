"""Row-wise kernels and narrow products against torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from baton.engine.kernels import Team
from baton.engine.quantize import NarrowProjection, PackedProjection, Projection, best_projection, can_multiply
from baton.engine.rowwise import Gate, Norm, activation_name

TEAM = Team(1)
ROWS = (1, 2, 3, 5, 8, 9, 17, 70)


@pytest.mark.parametrize("rows", ROWS)
def test_norm(rows: int) -> None:
    x, weight, residual = torch.randn(rows, 130), torch.randn(130), torch.randn(rows, 130)
    norm = Norm(weight, 1e-5, TEAM)
    expected = F.rms_norm(x, (130,), weight, 1e-5)
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(norm.plus(x, residual), residual + expected)


@pytest.mark.parametrize(
    ("name", "function"), [("silu", F.silu), ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh"))]
)
def test_gate(name: str, function: nn.Module) -> None:
    x = torch.randn(5, 2 * 77) * 20
    torch.testing.assert_close(Gate(name, TEAM)(x), function(x[:, :77]) * x[:, 77:], atol=1e-5, rtol=1e-5)


def test_activations_are_known_by_what_they_do() -> None:
    assert activation_name(nn.SiLU()) == "silu"
    assert activation_name(nn.GELU(approximate="tanh")) == "gelu_tanh"
    assert activation_name(nn.GELU()) is None


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("bias", [False, True])
def test_int8_is_the_product_with_rounded_weights(rows: int, bias: bool) -> None:
    weight, x = torch.randn(100, 66), torch.randn(rows, 66)
    shift = torch.randn(100) if bias else None
    narrow = NarrowProjection(weight, shift, torch.int8, 16, TEAM)
    assert narrow.scale is not None
    rounded = narrow.weight.float() * narrow.scale[:, None]
    assert (rounded - weight).abs().max() <= weight.abs().amax() / 127
    rough = rows > 16 and can_multiply(torch.bfloat16)  # inputs are rounded there
    torch.testing.assert_close(
        narrow(x), F.linear(x, rounded, shift), atol=0.3 if rough else 1e-4, rtol=2e-2 if rough else 1e-4
    )


@pytest.mark.parametrize("rows", ROWS)
def test_bfloat16_rounds_weights_only_while_rows_are_few(rows: int) -> None:
    weight, x = torch.randn(100, 66), torch.randn(rows, 66)
    expected = F.linear(x, weight.bfloat16().float())
    few = NarrowProjection(weight, None, torch.bfloat16, 1000, TEAM)
    torch.testing.assert_close(few(x), expected, atol=1e-4, rtol=1e-4)
    many = NarrowProjection(weight, None, torch.bfloat16, 0, TEAM)
    torch.testing.assert_close(many(x), expected, atol=0.3, rtol=2e-2)


@pytest.mark.skipif(not can_multiply(torch.float32), reason="no oneDNN here")
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("team", [TEAM, None])
def test_packed_products(rows: int, team: Team | None) -> None:
    weight, bias, x, residual = torch.randn(96, 64), torch.randn(96), torch.randn(rows, 64), torch.randn(rows, 96)
    packed = PackedProjection(weight, bias, team)
    torch.testing.assert_close(packed(x), F.linear(x, weight, bias), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(packed.plus(x, residual), residual + F.linear(x, weight, bias), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("weight_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_residual_is_added_whatever_the_weights(weight_dtype: str, rows: int) -> None:
    x, residual = torch.randn(rows, 64), torch.randn(rows, 96)
    projection = best_projection(Projection(torch.randn(96, 64), torch.randn(96)), weight_dtype, TEAM)
    torch.testing.assert_close(projection.plus(x, residual), residual + projection(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("weight_dtype", ["float32", "bfloat16", "int8"])
def test_no_rows_give_no_rows(weight_dtype: str) -> None:
    """A step may sample nothing (the middle of a prompt)."""
    projection = best_projection(Projection(torch.randn(96, 64)), weight_dtype, TEAM, is_head=True)
    assert projection(torch.empty(0, 64)).shape == (0, 96)


def test_merged_linears_are_side_by_side() -> None:
    linears = [nn.Linear(8, 5), nn.Linear(8, 3, bias=False), nn.Linear(8, 4)]
    x = torch.randn(7, 8)
    expected = torch.cat([linear(x) for linear in linears], 1)
    torch.testing.assert_close(Projection.merged(linears)(x), expected)


def test_a_team_runs_every_task_once_on_any_number_of_threads() -> None:
    x, weight = torch.randn(501, 128), torch.randn(128)
    one, three = (Norm(weight, 1e-6, Team(threads))(x) for threads in (1, 3))
    assert torch.equal(one, three)
