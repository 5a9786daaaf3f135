"""Attention on the CPU: numba kernels over float32 pages, one launch for decode rows and one for prompt tiles."""

from __future__ import annotations

from functools import cache

from torch import Tensor

from baton.engine.attention.base import HeadTransform, Rows, Spec, slots_of, tiles_of
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
        self.span = TILE // (heads // pool.layout.kv_heads)
        self.write, self.decode, self.prefill = kernels(pool.layout.head_dim, heads // pool.layout.kv_heads)

    def begin(self, rows: Rows) -> CpuStep:
        return CpuStep(self, rows)


class CpuStep:
    def __init__(self, owner: CpuAttention, rows: Rows) -> None:
        layout = owner.pool.layout
        self._owner = owner
        self._rows = rows
        self._slots = slots_of(rows, layout.page_size)
        self._tiles = tiles_of(rows, owner.span)
        page_floats = layout.page_bytes // 4
        self._layer_floats = page_floats // layout.layers
        self._pool = owner.pool.pages.data_ptr()
        self._geometry = (layout.kv_heads, layout.page_size, page_floats)
        self._places = (rows.pages.ctypes.data, rows.pages.shape[1])
        self._slots_place, self._starts_place = self._slots.ctypes.data, rows.starts.ctypes.data
        self._tiles_place, self._tile_count = self._tiles.ctypes.data, len(self._tiles)

    def attend(self, spec: Spec, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = _rows_apart(query), _rows_apart(key), _rows_apart(value)
        out = query.new_empty(query.shape)
        strides = (query.stride(0), key.stride(0), value.stride(0))
        self._launch(spec, strides, (query.data_ptr(), key.data_ptr(), value.data_ptr()), (0, 0, 0, 0), 0.0, out)
        return out

    def attend_merged(self, spec: Spec, merged: Tensor, transform: HeadTransform) -> Tensor:
        layout, heads = self._owner.pool.layout, self._owner.heads
        rows, width = merged.shape
        query = merged.data_ptr()
        key = query + 4 * heads * layout.head_dim
        value = key + 4 * layout.kv_heads * layout.head_dim
        norms = (0, 0)
        if transform.query_norm is not None and transform.key_norm is not None:
            norms = (transform.query_norm.data_ptr(), transform.key_norm.data_ptr())
        angles = (transform.cos.data_ptr(), transform.sin.data_ptr())
        out = merged.new_empty(rows, heads * layout.head_dim)
        self._launch(spec, (width, width, width), (query, key, value), (*angles, *norms), transform.eps, out)
        return out

    def _launch(
        self,
        spec: Spec,
        strides: tuple[int, int, int],
        inputs: tuple[int, int, int],
        transform: tuple[int, int, int, int],
        eps: float,
        out: Tensor,
    ) -> None:
        """One block of words for all three kernels; only the number of tasks and their table differ."""
        owner, decodes = self._owner, self._rows.decodes
        layer = (*self._geometry, spec.layer * self._layer_floats, *strides, self._pool, *inputs, *transform)
        where = (self._slots_place, out.data_ptr(), *self._places)
        numbers = (spec.window, 0, 0, 0, eps, spec.scale, spec.softcap, 0.0)
        run = owner.team.run_alone if self._rows.count == 1 else owner.team.run
        run(owner.write, self._rows.count, RUN, *layer, *where, 0, *numbers)
        if decodes:
            owner.team.run(owner.decode, decodes, 0, *layer, *where, self._starts_place, *numbers)
        if self._tile_count:
            owner.team.run(owner.prefill, self._tile_count, 0, *layer, *where, self._tiles_place, *numbers)


def _rows_apart(tensor: Tensor) -> Tensor:
    """[rows, heads, head_dim] with the heads of a row side by side, so that rows are one stride apart."""
    inner = tensor.stride()[1:] == (tensor.shape[2], 1)
    return tensor if inner else tensor.contiguous()
