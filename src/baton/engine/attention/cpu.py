"""Attention on the CPU: numba kernels over float32 pages, one launch for decode rows and one for prompt tiles."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from baton.engine.attention.base import HeadTransform, Rows, Spec
from baton.engine.attention.cpu_kernels import TILE, WORDS, make_decode, make_prefill, make_write
from baton.engine.kernels import Kernel, Team
from baton.engine.kv_pool import KVPool

RUN = 16
"""Rows whose KV is written by one task."""


@cache
def kernels(head_dim: int, group: int) -> tuple[Kernel, Kernel, Kernel]:
    """write, decode, prefill; compiled on first use in a process, from numba's disk cache if it is there."""
    write, decode, prefill = make_write(head_dim, group), make_decode(head_dim, group), make_prefill(head_dim, group)
    return Kernel(write, WORDS), Kernel(decode, WORDS), Kernel(prefill, WORDS)


def supports(pool: KVPool, heads: int) -> bool:
    """Whether the kernels can work on this pool; if not, `PlainAttention` does."""
    layout = pool.layout
    return (
        layout.dtype == "float32"
        and pool.pages.device.type == "cpu"
        and layout.head_dim % 8 == 0
        and heads // layout.kv_heads <= TILE
    )


class CpuAttention:
    def __init__(self, pool: KVPool, heads: int, team: Team) -> None:
        self.pool = pool
        self.heads = heads
        self.team = team
        self.group = heads // pool.layout.kv_heads
        self.write, self.decode, self.prefill = kernels(pool.layout.head_dim, self.group)

    def begin(self, rows: Rows) -> CpuStep:
        return CpuStep(self, rows)


class CpuStep:
    def __init__(self, owner: CpuAttention, rows: Rows) -> None:
        layout = owner.pool.layout
        self._owner = owner
        self._rows = rows
        self._pages = np.ascontiguousarray(rows.pages)
        self._starts = np.ascontiguousarray(rows.starts)
        self._slots = _slots(rows, layout.page_size)
        self._tiles = _tiles(rows, TILE // owner.group)
        self._tokens_per_page = layout.page_size
        self._page_floats = layout.page_bytes // 4
        self._layer_floats = self._page_floats // layout.layers

    def attend(self, spec: Spec, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self._attend(spec, _rows_apart(query), _rows_apart(key), _rows_apart(value), None)

    def attend_merged(self, spec: Spec, merged: Tensor, transform: HeadTransform) -> Tensor:
        layout, heads = self._owner.pool.layout, self._owner.heads
        split = merged.view(merged.shape[0], -1, layout.head_dim)
        query, key, value = split.split_with_sizes((heads, layout.kv_heads, layout.kv_heads), 1)
        return self._attend(spec, query, key, value, transform).flatten(1)

    def _attend(self, spec: Spec, query: Tensor, key: Tensor, value: Tensor, transform: HeadTransform | None) -> Tensor:
        owner, layout, count = self._owner, self._owner.pool.layout, self._rows.count
        out = query.new_empty(query.shape)
        t = transform
        geometry = (
            layout.kv_heads,
            layout.page_size,
            self._page_floats,
            spec.layer * self._layer_floats,
            query.stride(0),
            key.stride(0),
            value.stride(0),
            owner.pool.pages.data_ptr(),
        )
        rotation = (
            (t.cos.data_ptr(), t.sin.data_ptr(), _address(t.query_norm), _address(t.key_norm)) if t else (0, 0, 0, 0)
        )
        numbers = (t.eps if t else 0.0, spec.scale, spec.softcap, 0.0)

        def launch(kernel: Kernel, tasks: int, q: Tensor, o: Tensor, table: NDArray[np.int32], run: int = 0) -> None:
            run_here = owner.team.run_alone if tasks == 1 else owner.team.run
            run_here(
                kernel,
                tasks,
                run,
                *geometry,
                q.data_ptr(),
                key.data_ptr(),
                value.data_ptr(),
                *rotation,
                self._slots.ctypes.data,
                o.data_ptr(),
                self._pages.ctypes.data,
                self._pages.shape[1],
                table.ctypes.data,
                spec.window,
                0,
                0,
                0,
                *numbers,
            )

        launch(owner.write, count, query, out, self._starts, RUN)
        decodes = self._rows.decodes
        if decodes:
            launch(owner.decode, decodes, query, out, self._starts)
        if len(self._tiles):
            launch(owner.prefill, len(self._tiles), query, out, self._tiles)
        return out


def _slots(rows: Rows, page_size: int) -> NDArray[np.int64]:
    """[rows] page * page_size + offset of each row's token."""
    owners = np.repeat(np.arange(len(rows.counts)), rows.counts)
    pages = rows.pages[owners, rows.positions // page_size].astype(np.int64)
    return pages * page_size + rows.positions % page_size


def _tiles(rows: Rows, span: int) -> NDArray[np.int32]:
    """[tiles, 4] slice, first row, first position, positions: every chunk in runs of `span`; those that see most come
    first, so that the threads end together."""
    tiles = [
        (index, rows.first_rows[index] + at, rows.starts[index] + at, min(span, rows.counts[index] - at))
        for index in range(rows.decodes, len(rows.counts))
        for at in range(0, int(rows.counts[index]), span)
    ]
    tiles.sort(key=lambda tile: -tile[2])
    return np.array(tiles, dtype=np.int32).reshape(-1, 4)


def _rows_apart(tensor: Tensor) -> Tensor:
    """[rows, heads, head_dim] with the heads of a row side by side, so that rows are one stride apart."""
    inner = tensor.stride()[1:] == (tensor.shape[2], 1)
    return tensor if inner else tensor.contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
