"""Products of a float32 matrix with weights that lie in panels: one layout for one row and for a thousand.

    weights [outputs, inputs]  ──pack──▶  [panels, inputs, COLUMNS]     a panel: COLUMNS outputs, read front to back

A tile of ROWS rows x COLUMNS outputs is summed up in registers while a panel streams by, so few rows run at the speed
of memory and many rows at that of the multipliers. Panels are float32, bfloat16 or int8 (one scale per output) and are
widened on their way into the registers.

Every output is the same chain of additions along the inputs whatever the number of rows and threads is: a row's result
does not depend on the batch it is in, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic
from torch import Tensor

from baton.engine.kernels import Kernel, Team, floats, inline, take
from baton.engine.registers import (
    BYTE,
    LANES,
    VECTOR,
    WIDE,
    WORD,
    load,
    multiply,
    new_sums,
    prefetch,
    store,
    vector_at,
    words_at,
)

VECTORS = 2
COLUMNS = VECTORS * LANES
ROWS = 12 if WIDE else 6
"""ROWS x VECTORS sums, VECTORS operands and a scalar fit into the registers."""
DEPTH = 1024
"""Inputs of one tile: a part of a panel that many rows use stays in the second-level cache."""
AHEAD = 2048
"""Bytes of a panel between what is multiplied and what is fetched."""
INPUT_BYTES = 224 * 1024
"""Inputs of one task: they stay there, too."""


def pack(weight: Tensor) -> Tensor:
    """[outputs, inputs] -> [panels, inputs, COLUMNS]; outputs that are not there are zero."""
    padded = F.pad(weight, (0, 0, 0, -len(weight) % COLUMNS))
    return padded.view(-1, COLUMNS, weight.shape[1]).transpose(1, 2).contiguous()


class PanelProduct:
    """x [rows, inputs] -> x @ weight.T * scale + bias (+ residual), [rows, outputs]."""

    def __init__(self, weight: Tensor, scale: Tensor | None, bias: Tensor | None, team: Team) -> None:
        self.outputs, self.inputs = weight.shape
        self._panels = pack(weight)
        self._kept = (scale, bias)
        self._addresses = (self._panels.data_ptr(), _address(scale), _address(bias))
        self._team = team
        self._kernel = _kernel(weight.dtype)
        few = len(self._panels) // (8 * team.threads)  # enough tasks for the threads to end together
        self._few_span, self._many_span = max(1, min(few, 16)), 16
        self._block = max(1, INPUT_BYTES // (4 * min(self.inputs, DEPTH)) // ROWS) * ROWS

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        rows = x.shape[0]
        x = x.contiguous()
        residual = None if residual is None else residual.contiguous()
        y = x.new_empty(rows, self.outputs)
        span = self._few_span if rows <= self._block else self._many_span
        shape = (rows, self.outputs, self.inputs, self._block, span)
        self._team.run(self._kernel, *shape, x.data_ptr(), *self._addresses, y.data_ptr(), _address(residual))
        return y


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _row_of(builder: Any, row: Any, kind: int) -> list[Any]:
    """The row of a panel at `row`, widened. `kind`: bytes per weight."""
    if kind == 4:
        return [load(builder, row, v) for v in range(VECTORS)]
    stored = BYTE if kind == 1 else ir.IntType(16)
    narrow = [builder.load(vector_at(builder, row, v, stored), align=kind) for v in range(VECTORS)]
    integers = ir.VectorType(ir.IntType(32), LANES)
    if kind == 1:
        return [builder.sitofp(builder.sext(each, integers), VECTOR) for each in narrow]
    half = ir.Constant(integers, [16] * LANES)
    return [builder.bitcast(builder.shl(builder.zext(each, integers), half), VECTOR) for each in narrow]


def _make_tile(rows: int, kind: int) -> Any:
    """tile(places, panel, sums, depth), all int64: sums[i, c] = sum over d < depth of x_i[d] * panel[d, c]. `places`
    is the address of `rows` addresses of rows of x, `sums` that of a matrix of COLUMNS columns."""

    def tile(_typing: Any, places: Any, panel: Any, sums: Any, depth: Any) -> Any:
        def generate(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
            places, panel, target, depth = values
            sums = new_sums(builder, rows, VECTORS)
            x = words_at(builder, places, rows)

            def left(step: Any, i: int) -> Any:
                return builder.add(x[i], builder.mul(step, WORD(4)))

            def right(step: Any) -> list[Any]:
                row = builder.add(panel, builder.mul(step, WORD(kind * COLUMNS)))
                if rows > 1:  # with one row the processor itself runs ahead far enough
                    prefetch(builder, builder.add(row, WORD(AHEAD)))
                return _row_of(builder, row, kind)

            multiply(builder, depth, left, right, sums)
            for i in range(rows):
                for v in range(VECTORS):
                    store(builder, builder.load(sums[i][v]), target, i * VECTORS + v)

        word = types.int64
        return types.void(word, word, word, word), generate

    return intrinsic(tile)


def _finish(words: Any, place: Any, row: Any, column: Any, columns: Any, first: Any) -> None:
    """A row of a tile becomes outputs: times scale, plus bias and residual if it is the first part of the inputs, else
    added to what is there."""
    at = 4 * (row * words[2] + column)
    total, y = floats(place, columns), floats(words[10] + at, columns)
    if words[8] != 0:
        scale = floats(words[8] + 4 * column, columns)
        for c in range(columns):
            total[c] *= scale[c]
    if first and words[9] != 0:
        bias = floats(words[9] + 4 * column, columns)
        for c in range(columns):
            total[c] += bias[c]
    if first and words[11] != 0:
        residual = floats(words[11] + at, columns)
        for c in range(columns):
            total[c] += residual[c]
    if first:
        for c in range(columns):
            y[c] = total[c]
    else:
        for c in range(columns):
            y[c] += total[c]


finish = inline(_finish)


def _make_multiply(kind: int) -> Callable[[Any], None]:
    """A task is a block of rows times a span of panels; `kind`: bytes per weight (1 int8, 2 bfloat16, 4 float32)."""
    tile1, tile2, tile3, tile4, tile = (_make_tile(rows, kind) for rows in (1, 2, 3, 4, ROWS))

    def multiply(raw: Any) -> None:
        words = carray(raw, (16,), types.int64)
        rows, outputs, inputs, block, span = words[1], words[2], words[3], words[4], words[5]
        panels = (outputs + COLUMNS - 1) // COLUMNS
        spans = (panels + span - 1) // span
        tasks = (rows + block - 1) // block * spans
        sums = np.empty((ROWS, COLUMNS), np.float32)
        places = np.empty(ROWS, np.int64)
        target, source = sums.ctypes.data, places.ctypes.data
        while True:
            task = take(raw)
            if task >= tasks:
                break
            first_row, first_panel = task // spans * block, task % spans * span
            last_row, last_panel = min(first_row + block, rows), min(first_panel + span, panels)
            for start in range(0, inputs, DEPTH):
                depth = min(DEPTH, inputs - start)
                for panel in range(first_panel, last_panel):
                    weights = words[7] + kind * COLUMNS * (panel * inputs + start)
                    column = panel * COLUMNS
                    columns = min(COLUMNS, outputs - column)
                    for row in range(first_row, last_row, ROWS):
                        count = min(ROWS, last_row - row)
                        for i in range(ROWS):
                            places[i] = words[6] + 4 * (min(row + i, last_row - 1) * inputs + start)
                        if count == 1:
                            tile1(source, weights, target, depth)
                        elif count == 2:
                            tile2(source, weights, target, depth)
                        elif count == 3:
                            tile3(source, weights, target, depth)
                        elif count == 4:
                            tile4(source, weights, target, depth)
                        else:
                            tile(source, weights, target, depth)
                        for i in range(count):
                            finish(words, target + 4 * i * COLUMNS, row + i, column, columns, start == 0)

    return multiply


@cache
def _kernel(stored: torch.dtype) -> Kernel:
    return Kernel(_make_multiply(stored.itemsize), "qqqqqqqqqqq")
