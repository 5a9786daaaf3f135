"""Linear layers for the CPU: the same numbers in the layout and the precision that the machine multiplies fastest.

| weight dtype | product                                                                                      |
|--------------|----------------------------------------------------------------------------------------------|
| float32      | panels                                                                                       |
| bfloat16     | panels, float inputs; many rows: inputs rounded to bfloat16, where the CPU multiplies those  |
| int8         | panels with one scale per output; many rows: as bfloat16                                     |

The output projection keeps float inputs whatever the number of rows: logits rounded to bfloat16 tie.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baton.engine.kernels import Team
from baton.engine.panels import PanelProduct

FEW_ROWS = {torch.bfloat16: 8, torch.int8: 16}
"""Up to here a product with narrow weights is limited by reading them, and gains nothing from rounded inputs."""


class Projection:
    """A linear layer as it was loaded: any device, any dtype. x [rows, inputs] -> [rows, outputs]."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual + self(x)"""
        return residual + self(x)

    @classmethod
    def merged(cls, linears: Sequence[nn.Linear]) -> Projection:
        """One layer whose output is that of `linears`, side by side."""
        if len(linears) == 1:
            return cls(linears[0].weight.data, None if linears[0].bias is None else linears[0].bias.data)
        weight = torch.cat([linear.weight.data for linear in linears])
        if all(linear.bias is None for linear in linears):
            return cls(weight)
        biases = [weight.new_zeros(each.out_features) if each.bias is None else each.bias.data for each in linears]
        return cls(weight, torch.cat(biases))


class PanelProjection(Projection):
    """float32 inputs and outputs; weights in panels, float32, bfloat16, or int8 with one scale per output.

    `weight` is what was rounded, [outputs, inputs], and `scale` [outputs] or None; they are let go of if `keep` is
    False, because the panels hold them.
    """

    def __init__(self, linear: Projection, stored: torch.dtype, team: Team, *, keep: bool = False) -> None:
        weight, self.scale = _rounded(linear.weight, stored)
        self._product = PanelProduct(weight, self.scale, linear.bias, team)
        super().__init__(weight if keep else weight.new_empty(0), linear.bias)

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(x)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        return self._product(x, residual)


class RoundingProjection(PanelProjection):
    """Narrow weights; with more than `few_rows`, inputs are rounded to bfloat16, too, for a CPU that multiplies these
    faster than float32. Costs a second copy of the weights."""

    def __init__(self, linear: Projection, stored: torch.dtype, team: Team, few_rows: int) -> None:
        super().__init__(linear, stored, team, keep=True)
        self._few_rows = few_rows

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) if x.shape[0] <= self._few_rows else self._many(x)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        return super().plus(x, residual) if x.shape[0] <= self._few_rows else self._many(x).add_(residual)

    def _many(self, x: Tensor) -> Tensor:
        y = F.linear(x.to(torch.bfloat16), self.weight.to(torch.bfloat16)).float()
        if self.scale is not None:
            y *= self.scale
        return y if self.bias is None else y + self.bias


def _rounded(weight: Tensor, stored: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The weights as `stored`, and the scale of each output."""
    if stored != torch.int8:
        return weight.to(stored), None
    scale = (weight.abs().amax(1) / 127).clamp_min(1e-12)
    return (weight / scale[:, None]).round().to(torch.int8), scale


@cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has products of bfloat16 (AVX-512), and torch a library that uses them."""
    available: Callable[[], bool] = torch.backends.mkldnn.is_available
    return available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def best_projection(linear: Projection, weight_dtype: str, team: Team, *, is_head: bool = False) -> Projection:
    """The same layer in the form that is fastest here for `weight_dtype`."""
    stored = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}[weight_dtype]
    if stored == torch.float32 or is_head or not multiplies_bfloat16():
        return PanelProjection(linear, stored, team)
    return RoundingProjection(linear, stored, team, FEW_ROWS[stored])
