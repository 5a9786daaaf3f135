"""Norms and gated activations: what happens to each row of the hidden state alone, in one pass over it."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numba import carray, types
from torch import Tensor, nn

from baton.engine.kernels import Kernel, Team, f32, floats, sigmoid, take, tanh

ALONE = 8192
"""Elements up to which waking other threads costs more than it brings."""

ACTIVATIONS = ("silu", "gelu_tanh")


def _norm(raw: Any) -> None:
    words = carray(raw, (16,), types.int64)
    numbers = carray(raw, (16,), types.float64)
    rows, size = words[1], words[2]
    weight = floats(words[4], size)
    eps = f32(numbers[8])
    while True:
        row = take(raw)
        if row >= rows:
            break
        source = floats(words[3] + 4 * row * words[7], size)
        target = floats(words[6] + 4 * row * size, size)
        total = f32(0.0)
        for i in range(size):
            total += source[i] * source[i]
        factor = f32(1.0) / np.sqrt(total / f32(size) + eps)
        if words[5] == 0:
            for i in range(size):
                target[i] = source[i] * factor * weight[i]
        else:
            residual = floats(words[5] + 4 * row * size, size)
            for i in range(size):
                target[i] = residual[i] + source[i] * factor * weight[i]


def _silu_gate(raw: Any) -> None:
    words = carray(raw, (16,), types.int64)
    rows, size = words[1], words[2]
    while True:
        row = take(raw)
        if row >= rows:
            break
        gate = floats(words[3] + 8 * row * size, size)
        up = floats(words[3] + 8 * row * size + 4 * size, size)
        target = floats(words[4] + 4 * row * size, size)
        for i in range(size):
            target[i] = gate[i] * sigmoid(gate[i]) * up[i]


def _gelu_tanh_gate(raw: Any) -> None:
    words = carray(raw, (16,), types.int64)
    rows, size = words[1], words[2]
    while True:
        row = take(raw)
        if row >= rows:
            break
        gate = floats(words[3] + 8 * row * size, size)
        up = floats(words[3] + 8 * row * size + 4 * size, size)
        target = floats(words[4] + 4 * row * size, size)
        for i in range(size):
            x = gate[i]
            inner = f32(0.7978845608028654) * (x + f32(0.044715) * x * x * x)
            target[i] = f32(0.5) * x * (f32(1.0) + tanh(inner)) * up[i]


@cache
def _kernel(name: str) -> Kernel:
    """Compiled on first use in a process, from numba's disk cache if it is there."""
    if name == "norm":
        return Kernel(_norm, "qqqqqqqd")
    return Kernel({"silu": _silu_gate, "gelu_tanh": _gelu_tanh_gate}[name], "qqqq")


class Norm:
    """RMS norm: x / rms(x) * weight, computed in float32. A team: by our kernel, for float32 on the CPU."""

    def __init__(self, weight: Tensor, eps: float, team: Team | None) -> None:
        self.weight = weight.contiguous()
        self.eps = eps
        self._team = team

    def __call__(self, x: Tensor) -> Tensor:
        if self._team is None:
            return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)
        return self._run(self._team, x.contiguous(), 0)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual + norm(x)"""
        if self._team is None or not residual.is_contiguous():
            return residual + self(x)
        return self._run(self._team, x.contiguous(), residual.data_ptr())

    def _run(self, team: Team, x: Tensor, residual: int) -> Tensor:
        out = torch.empty_like(x)
        size, count = x.shape[-1], x.numel()
        places = (x.data_ptr(), self.weight.data_ptr(), residual, out.data_ptr(), size)
        run = team.run_alone if count <= ALONE else team.run
        run(_kernel("norm"), count // size, size, *places, self.eps)
        return out


class Gate:
    """[..., 2 * size] -> activation of the first half times the second half, [..., size]."""

    def __init__(self, name: str, team: Team | None) -> None:
        assert name in ACTIVATIONS
        self.name = name
        self._team = team

    def __call__(self, x: Tensor) -> Tensor:
        size = x.shape[-1] // 2
        if self._team is None:
            gate, up = x[..., :size], x[..., size:]
            return (F.silu(gate) if self.name == "silu" else F.gelu(gate, approximate="tanh")) * up
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], size)
        run = self._team.run_alone if out.numel() <= ALONE else self._team.run
        run(_kernel(self.name), out.numel() // size, size, x.data_ptr(), out.data_ptr())
        return out


def activation_name(module: nn.Module) -> str | None:
    """Which of `ACTIVATIONS` the module computes, if any: by what it does, not by what it is called."""
    x = torch.linspace(-6, 6, 97)
    known = {"silu": F.silu(x), "gelu_tanh": F.gelu(x, approximate="tanh")}
    y = module(x)
    return next((name for name, value in known.items() if torch.allclose(y, value, atol=1e-6, rtol=1e-6)), None)
