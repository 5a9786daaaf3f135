"""Linear layers for the CPU: the same numbers in the layout and the precision that the machine multiplies fastest.

| weight dtype | few rows (decode)                        | many rows (prefill)                                  |
|--------------|------------------------------------------|------------------------------------------------------|
| float32      | our kernel, where memory is plentiful    | oneDNN, weights packed once                          |
| bfloat16     | our kernel: float inputs, narrow weights | inputs rounded to bfloat16, where the CPU has AVX-512 |
| int8         | our kernel, one scale per output         | weights made wide again for one product              |

The output projection keeps float inputs and outputs whatever the number of rows: logits rounded to bfloat16 tie.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from numba import carray, types
from torch import Tensor, nn

from baton.engine.kernels import Kernel, Team, as_float, f32, floats, i32, inline, pointer, take

FEW_ROWS = {torch.float32: 4, torch.bfloat16: 8, torch.int8: 16}
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


class RowKernel:
    """x [few rows, inputs] -> x @ weight.T * scale + bias (+ residual), with weights as they are stored."""

    def __init__(self, weight: Tensor, scale: Tensor | None, bias: Tensor | None, team: Team) -> None:
        self.weight = weight.contiguous()
        self._kept = (scale, bias)
        self._scale, self._bias = _address(scale), _address(bias)
        self._team = team
        self._kernel = _multiply(weight.dtype)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        (rows, inputs), outputs = x.shape, self.weight.shape[0]
        x = x.contiguous()
        residual = None if residual is None else residual.contiguous()
        y = x.new_empty(rows, outputs)
        weights = (self.weight.data_ptr(), self._scale, self._bias)
        self._team.run(self._kernel, rows, outputs, inputs, x.data_ptr(), *weights, y.data_ptr(), _address(residual))
        return y


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class PackedProjection(Projection):
    """float32 weights in oneDNN's own layout; with a team also as they are, for few rows."""

    def __init__(self, weight: Tensor, bias: Tensor | None, team: Team | None = None) -> None:
        super().__init__(torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1024), bias)
        self._few = None if team is None else RowKernel(weight, None, bias, team)
        self._few_rows = 0 if team is None else FEW_ROWS[torch.float32]
        self._multiply: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise.default
        self._multiply_add: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise.binary

    def __call__(self, x: Tensor) -> Tensor:
        if self._few is not None and x.shape[0] <= self._few_rows:
            return self._few(x)
        if x.shape[0] == 1:  # as two rows: oneDNN's path for vectors is half as fast as the one for matrices
            return self._multiply(torch.cat((x, x)), self.weight, self.bias, "none", [], "")[:1]
        return self._multiply(x, self.weight, self.bias, "none", [], "")

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        if self._few is not None and x.shape[0] <= self._few_rows:
            return self._few(x, residual)
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
        self.scale = None
        if narrow == torch.int8:
            self.scale = (weight.abs().amax(1) / 127).clamp_min(1e-12)
            weight = (weight / self.scale[:, None]).round()
        super().__init__(weight.to(narrow).contiguous(), bias)
        self._few = RowKernel(self.weight, self.scale, bias, team)
        self._few_rows = few_rows
        self._wide = torch.bfloat16 if can_multiply(torch.bfloat16) else torch.float32

    def __call__(self, x: Tensor) -> Tensor:
        return self._few(x) if x.shape[0] <= self._few_rows else self._many(x)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        return self._few(x, residual) if x.shape[0] <= self._few_rows else self._many(x).add_(residual)

    def _many(self, x: Tensor) -> Tensor:
        y = F.linear(x.to(self._wide), self.weight.to(self._wide)).float()
        if self.scale is not None:
            y *= self.scale
        return y if self.bias is None else y + self.bias


def best_projection(
    linear: Projection, weight_dtype: str, team: Team, *, is_head: bool = False, roomy: bool = True
) -> Projection:
    """The same layer in the form that is fastest here for `weight_dtype`; `roomy`: two copies may be kept."""
    if weight_dtype == "float32":
        fast = can_multiply(torch.float32)
        return PackedProjection(linear.weight, linear.bias, team if roomy else None) if fast else linear
    narrow = torch.int8 if weight_dtype == "int8" else torch.bfloat16
    few_rows = HEAD_ROWS if is_head else FEW_ROWS[narrow]
    return NarrowProjection(linear.weight, linear.bias, narrow, few_rows, team)


def is_roomy(model: nn.Module) -> bool:
    """Whether the model's parameters are less than an eighth of this machine's memory."""
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return size * 8 <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _make_multiply(kind: int) -> Callable[[Any], None]:
    """y[m, n] = scale[n] * sum of x[m, k] * w[n, k] + bias[n] + residual[m, n]. `kind` of weights: 1 int8, 2 bfloat16,
    4 float32 (their bytes). A task is COLUMNS outputs; four rows at a time share what was read of the weights."""
    stored = {1: types.int8, 2: types.int16, 4: types.float32}[kind]

    def _widen(w: Any) -> Any:
        return as_float(i32(w) << i32(16)) if kind == 2 else f32(w)

    widen = inline(_widen)

    def multiply(raw: Any) -> None:
        words = carray(raw, (16,), types.int64)
        rows, outputs, inputs = words[1], words[2], words[3]
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
                    w = carray(pointer(words[5] + n * inputs * kind), (inputs,), stored)
                    s0, s1, s2, s3 = f32(0.0), f32(0.0), f32(0.0), f32(0.0)
                    if rows - m == 1:
                        for k in range(inputs):
                            s0 += x0[k] * widen(w[k])
                    else:
                        for k in range(inputs):
                            v = widen(w[k])
                            s0 += x0[k] * v
                            s1 += x1[k] * v
                            s2 += x2[k] * v
                            s3 += x3[k] * v
                    scale = floats(words[6] + 4 * n, 1)[0] if words[6] != 0 else f32(1.0)
                    shift = floats(words[7] + 4 * n, 1)[0] if words[7] != 0 else f32(0.0)
                    for i in range(min(4, rows - m)):
                        total = s0 if i == 0 else s1 if i == 1 else s2 if i == 2 else s3
                        at = 4 * ((m + i) * outputs + n)
                        more = floats(words[9] + at, 1)[0] if words[9] != 0 else f32(0.0)
                        floats(words[8] + at, 1)[0] = total * scale + shift + more

    return multiply


@cache
def _multiply(stored: torch.dtype) -> Kernel:
    return Kernel(_make_multiply(stored.itemsize), "qqqqqqqqq")
