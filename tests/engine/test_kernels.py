"""Row-wise kernels and narrow products against torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baton.engine.kernels import Team
from baton.engine.panels import DEPTH
from baton.engine.quantize import PanelProjection, Projection, RoundingProjection, best_projection
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


STORED = [torch.float32, torch.bfloat16, torch.int8]


def reference(linear: Projection, stored: torch.dtype) -> tuple[Tensor, Tensor]:
    """The weights that `stored` can hold, [outputs, inputs], and what a product may be wrong by."""
    weight = linear.weight
    if stored == torch.int8:
        scale = weight.abs().amax(1, keepdim=True) / 127
        return (weight / scale).round() * scale, scale
    return weight.to(stored).float(), torch.tensor(0.0)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("outputs", "inputs"), [(100, 66), (16, 1), (1, 5), (33, DEPTH + 3), (640, 2 * DEPTH)])
def test_products_are_those_of_the_stored_weights(stored: torch.dtype, rows: int, outputs: int, inputs: int) -> None:
    linear = Projection(torch.randn(outputs, inputs), torch.randn(outputs))
    x, residual = torch.randn(rows, inputs), torch.randn(rows, outputs)
    weight, error = reference(linear, stored)
    assert (weight - linear.weight).abs().max() <= max(float(error.max()), 2.0**-8 * float(linear.weight.abs().max()))
    expected = F.linear(x.double(), weight.double(), linear.bias.double() if linear.bias is not None else None).float()
    product = PanelProjection(linear, stored, TEAM)
    torch.testing.assert_close(product(x), expected, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(product.plus(x, residual), residual + expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("stored", STORED)
def test_a_row_does_not_depend_on_its_batch(stored: torch.dtype) -> None:
    """Bit for bit: alone, among others, on another number of threads."""
    linear, x = Projection(torch.randn(200, 300), torch.randn(200)), torch.randn(500, 300)
    one, three = PanelProjection(linear, stored, TEAM), PanelProjection(linear, stored, Team(3))
    whole = one(x)
    assert torch.equal(whole, three(x))
    for first, last in ((0, 1), (1, 3), (3, 6), (6, 10), (10, 15), (15, 21), (21, 38), (38, 500)):
        assert torch.equal(whole[first:last], one(x[first:last]))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.int8])
def test_inputs_are_rounded_only_where_rows_are_many(stored: torch.dtype) -> None:
    linear, x = Projection(torch.randn(100, 66), torch.randn(100)), torch.randn(9, 66)
    exact = PanelProjection(linear, stored, TEAM)
    rounding = RoundingProjection(linear, stored, TEAM, few_rows=8)
    assert torch.equal(rounding(x[:8]), exact(x[:8]))
    assert torch.equal(rounding.plus(x[:8], exact(x[:8])), exact.plus(x[:8], exact(x[:8])))
    torch.testing.assert_close(rounding(x), exact(x), atol=0.3, rtol=2e-2)
    torch.testing.assert_close(rounding.plus(x, exact(x)), exact.plus(x, exact(x)), atol=0.3, rtol=2e-2)


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
