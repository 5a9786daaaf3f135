"""Linear layers for the CPU: the same numbers in the layout and the precision that the machine multiplies fastest.

| weight dtype | few rows (decode)                       | many rows (prefill)                                    |
|--------------|-----------------------------------------|--------------------------------------------------------|
| float32      | oneDNN, weights packed once             | the same                                               |
| bfloat16     | oneDNN, weights packed, inputs rounded  | the same; without AVX-512: as int8, weights in float32 |
| int8         | our kernel: float inputs, int8 weights  | weights made bfloat16 again for one product            |

The output projection keeps float inputs and outputs in every mode: logits that are rounded to bfloat16 tie.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from numba import carray, types
from torch import Tensor, nn

from baton.engine.kernels import Kernel, Team, as_float, f32, floats, i32, pointer, take

FEW_ROWS = 32
"""Up to here a product is limited by reading the weights, and narrow weights are read as they are."""
COLUMNS = 64
"""Output columns of one task."""


class Projection(nn.Module):
    """A linear layer as it was loaded: any device, any dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual + self(x)"""
        return residual + self(x)

    @classmethod
    def merged(cls, linears: list[nn.Linear]) -> Projection:
        """One layer whose output is that of `linears`, side by side."""
        weight = torch.cat([linear.weight for linear in linears])
        if all(linear.bias is None for linear in linears):
            return cls(weight)
        biases = [weight.new_zeros(l.out_features) if l.bias is None else l.bias for l in linears]
        return cls(weight, torch.cat(biases))


class PackedProjection(Projection):
    """Weights in oneDNN's own layout, in `dtype`; inputs and outputs are float32 outside."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype).contiguous(), 1024)
        super().__init__(packed, None if bias is None else bias.to(dtype))
        self.dtype = dtype
        self.out_features = weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(self._rows(x), self.weight, self.bias, "none", [], "")
        return self._back(y, x)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        if self.dtype != torch.float32 or x.shape[0] == 1:
            return residual + self(x)
        y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")
        return y

    def _rows(self, x: Tensor) -> Tensor:
        """One row is made two: oneDNN's path for vectors is half as fast as the one for matrices."""
        x = x.to(self.dtype)
        return torch.cat((x, x)) if x.dim() == 2 and x.shape[0] == 1 else x

    def _back(self, y: Tensor, x: Tensor) -> Tensor:
        return (y[:1] if x.dim() == 2 and x.shape[0] == 1 else y).to(x.dtype)


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this machine multiplies `dtype` well through oneDNN."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


class NarrowProjection(Projection):
    """Weights as int8 with one scale per output, or as bfloat16; few rows are multiplied by our own kernel."""

    def __init__(self, weight: Tensor, bias: Tensor | None, narrow: torch.dtype, team: Team) -> None:
        if narrow == torch.int8:
            scale = (weight.abs().amax(1) / 127).clamp_min(1e-12).float()
            stored = (weight / scale[:, None]).round().to(torch.int8)
        else:
            scale = torch.ones(weight.shape[0])
            stored = weight.to(narrow)
        super().__init__(stored.contiguous(), None if bias is None else bias.float())
        self.scale = nn.Parameter(scale, requires_grad=False)
        self._team = team
        self._wide = torch.bfloat16 if can_pack(torch.bfloat16) and narrow == torch.int8 else torch.float32

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).float()
        y = self._few(rows.contiguous()) if rows.shape[0] <= FEW_ROWS else self._many(rows)
        return y.view(*x.shape[:-1], -1).to(x.dtype)

    def _few(self, x: Tensor) -> Tensor:
        outputs, size = self.weight.shape
        y = x.new_empty(x.shape[0], outputs)
        bias = 0 if self.bias is None else self.bias.data_ptr()
        self._team.run(
            _multiply(self.weight.dtype == torch.int8),
            *(x.shape[0], outputs, size, x.data_ptr(), self.weight.data_ptr(), self.scale.data_ptr(), bias),
            y.data_ptr(),
        )
        return y

    def _many(self, x: Tensor) -> Tensor:
        y = F.linear(x.to(self._wide), self.weight.to(self._wide)).float() * self.scale
        return y if self.bias is None else y + self.bias


def _make_multiply(is_int8: bool) -> Any:
    """y[m, n] = scale[n] * sum of x[m, k] * w[n, k] + bias[n]. A task is COLUMNS outputs; four rows at a time share
    what was read of the weights."""
    stored = types.int8 if is_int8 else types.int16

    def multiply(raw: Any) -> None:
        words = carray(raw, (16,), types.int64)
        rows, outputs, size = words[1], words[2], words[3]
        scale = floats(words[6], outputs)
        y = floats(words[8], rows * outputs)
        while True:
            first = take(raw) * COLUMNS
            if first >= outputs:
                break
            for n in range(first, min(first + COLUMNS, outputs)):
                place = words[5] + n * size * (1 if is_int8 else 2)
                w = carray(pointer(place), (size,), stored)
                shift = floats(words[7], outputs)[n] if words[7] != 0 else f32(0.0)
                for m in range(0, rows, 4):
                    x0 = floats(words[4] + 4 * size * m, size)
                    x1 = floats(words[4] + 4 * size * min(m + 1, rows - 1), size)
                    x2 = floats(words[4] + 4 * size * min(m + 2, rows - 1), size)
                    x3 = floats(words[4] + 4 * size * min(m + 3, rows - 1), size)
                    s0, s1, s2, s3 = f32(0.0), f32(0.0), f32(0.0), f32(0.0)
                    if rows - m == 1:
                        for k in range(size):
                            s0 += x0[k] * (f32(w[k]) if is_int8 else as_float(i32(w[k]) << i32(16)))
                    else:
                        for k in range(size):
                            v = f32(w[k]) if is_int8 else as_float(i32(w[k]) << i32(16))
                            s0 += x0[k] * v
                            s1 += x1[k] * v
                            s2 += x2[k] * v
                            s3 += x3[k] * v
                    y[m * outputs + n] = s0 * scale[n] + shift
                    if m + 1 < rows:
                        y[(m + 1) * outputs + n] = s1 * scale[n] + shift
                    if m + 2 < rows:
                        y[(m + 2) * outputs + n] = s2 * scale[n] + shift
                    if m + 3 < rows:
                        y[(m + 3) * outputs + n] = s3 * scale[n] + shift

    return multiply


@cache
def _multiply(is_int8: bool) -> Kernel:
    return Kernel(_make_multiply(is_int8), "qqqqqqqq")


def narrow_linears(model: nn.Module, weight_dtype: str, team: Team) -> None:
    """Replace every linear layer of a float32 CPU model by the best one for `weight_dtype`, one after another, so
    that no more than one layer is there twice."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in (nn.Linear, Projection):
                setattr(parent, name, _narrowed(child, weight_dtype, team, is_head=child is head))


def _narrowed(linear: nn.Module, weight_dtype: str, team: Team, *, is_head: bool) -> Projection:
    weight, bias = linear.weight.data, None if linear.bias is None else linear.bias.data
    if weight_dtype == "int8":
        return NarrowProjection(weight, bias, torch.int8, team)
    dtype = torch.bfloat16 if weight_dtype == "bfloat16" else torch.float32
    if dtype == torch.bfloat16 and (is_head or not can_pack(dtype)):
        return NarrowProjection(weight, bias, dtype, team)
    return PackedProjection(weight, bias, dtype) if can_pack(dtype) else Projection(weight, bias)
