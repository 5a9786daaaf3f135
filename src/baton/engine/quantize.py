"""Linear layers for the CPU: the same numbers in the layout and the precision that the machine multiplies fastest.

| weight dtype | few rows (decode)                        | many rows (prefill)                                  |
|--------------|------------------------------------------|------------------------------------------------------|
| float32      | oneDNN, weights packed once              | the same                                             |
| bfloat16     | our kernel: float inputs, narrow weights | inputs rounded to bfloat16, where the CPU has AVX-512 |
| int8         | our kernel, one scale per output         | weights made wide again for one product              |

The output projection keeps float inputs and outputs whatever the number of rows: logits rounded to bfloat16 tie.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from numba import carray, types
from torch import Tensor, nn

from baton.engine.kernels import Kernel, Team, as_float, f32, floats, i32, pointer, take

FEW_ROWS = {torch.bfloat16: 8, torch.int8: 16}
"""Up to here a product is limited by reading the weights, and our kernel reads them as they are stored."""
HEAD_ROWS = 64
"""The same for the output projection, which gains nothing from rounded inputs."""
COLUMNS = 32
"""Output columns of one task."""


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


class PackedProjection(Projection):
    """float32 weights in oneDNN's own layout."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1024), bias)
        self._multiply: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise.default
        self._multiply_add: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise.binary

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] == 1:  # as two rows: oneDNN's path for vectors is half as fast as the one for matrices
            return self._multiply(torch.cat((x, x)), self.weight, self.bias, "none", [], "")[:1]
        return self._multiply(x, self.weight, self.bias, "none", [], "")

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        if x.shape[0] == 1:
            return residual + self(x)
        return self._multiply_add(x, residual, self.weight, self.bias, "add")


@cache
def can_multiply(dtype: torch.dtype) -> bool:
    """Whether this machine multiplies `dtype` well through oneDNN."""
    available: Callable[[], bool] = torch.backends.mkldnn.is_available
    if not (available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")):
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class NarrowProjection(Projection):
    """Weights as int8 with one scale per output, or as bfloat16; inputs and outputs are float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None, narrow: torch.dtype, few_rows: int, team: Team) -> None:
        if narrow == torch.int8:
            self.scale = (weight.abs().amax(1) / 127).clamp_min(1e-12)
            weight = (weight / self.scale[:, None]).round()
        else:
            self.scale = weight.new_ones(weight.shape[0])
        super().__init__(weight.to(narrow).contiguous(), bias)
        self._few_rows = few_rows
        self._team = team
        self._kernel = _multiply(narrow == torch.int8)
        self._wide = torch.bfloat16 if can_multiply(torch.bfloat16) else torch.float32

    def __call__(self, x: Tensor) -> Tensor:
        return self._few(x.contiguous()) if x.shape[0] <= self._few_rows else self._many(x)

    def _few(self, x: Tensor) -> Tensor:
        (rows, inputs), outputs = x.shape, self.weight.shape[0]
        y = x.new_empty(rows, outputs)
        bias = 0 if self.bias is None else self.bias.data_ptr()
        places = (x.data_ptr(), self.weight.data_ptr(), self.scale.data_ptr(), bias, y.data_ptr())
        self._team.run(self._kernel, rows, outputs, inputs, *places)
        return y

    def _many(self, x: Tensor) -> Tensor:
        y = F.linear(x.to(self._wide), self.weight.to(self._wide)).float()
        if self.weight.dtype == torch.int8:
            y *= self.scale
        return y if self.bias is None else y + self.bias


def best_projection(linear: Projection, weight_dtype: str, team: Team, *, is_head: bool = False) -> Projection:
    """The same layer in the form that is fastest here for `weight_dtype`."""
    if weight_dtype == "float32":
        fast = can_multiply(torch.float32)
        return PackedProjection(linear.weight, linear.bias) if fast else linear
    narrow = torch.int8 if weight_dtype == "int8" else torch.bfloat16
    few_rows = HEAD_ROWS if is_head else FEW_ROWS[narrow]
    return NarrowProjection(linear.weight, linear.bias, narrow, few_rows, team)


def _make_multiply(is_int8: bool) -> Callable[[Any], None]:
    """y[m, n] = scale[n] * sum of x[m, k] * w[n, k] + bias[n]. A task is COLUMNS outputs; four rows at a time share
    what was read of the weights."""
    stored = types.int8 if is_int8 else types.int16
    width = 1 if is_int8 else 2

    def multiply(raw: Any) -> None:
        words = carray(raw, (16,), types.int64)
        rows, outputs, inputs = words[1], words[2], words[3]
        scale = floats(words[6], outputs)
        while True:
            first = take(raw) * COLUMNS
            if first >= outputs:
                break
            for m in range(0, rows, 4):
                x0 = floats(words[4] + 4 * inputs * m, inputs)
                x1 = floats(words[4] + 4 * inputs * min(m + 1, rows - 1), inputs)
                x2 = floats(words[4] + 4 * inputs * min(m + 2, rows - 1), inputs)
                x3 = floats(words[4] + 4 * inputs * min(m + 3, rows - 1), inputs)
                for n in range(first, min(first + COLUMNS, outputs)):
                    w = carray(pointer(words[5] + n * inputs * width), (inputs,), stored)
                    shift = floats(words[7] + 4 * n, 1)[0] if words[7] != 0 else f32(0.0)
                    s0, s1, s2, s3 = f32(0.0), f32(0.0), f32(0.0), f32(0.0)
                    if rows - m == 1:
                        for k in range(inputs):
                            s0 += x0[k] * (f32(w[k]) if is_int8 else as_float(i32(w[k]) << i32(16)))
                    else:
                        for k in range(inputs):
                            v = f32(w[k]) if is_int8 else as_float(i32(w[k]) << i32(16))
                            s0 += x0[k] * v
                            s1 += x1[k] * v
                            s2 += x2[k] * v
                            s3 += x3[k] * v
                    y = floats(words[8] + 4 * (m * outputs + n), 1 + 3 * outputs)
                    y[0] = s0 * scale[n] + shift
                    if m + 1 < rows:
                        y[outputs] = s1 * scale[n] + shift
                    if m + 2 < rows:
                        y[2 * outputs] = s2 * scale[n] + shift
                    if m + 3 < rows:
                        y[3 * outputs] = s3 * scale[n] + shift

    return multiply


@cache
def _multiply(is_int8: bool) -> Kernel:
    return Kernel(_make_multiply(is_int8), "qqqqqqqq")
