"""Attention on a GPU: Triton kernels over the pool, and decode steps replayed as CUDA graphs.

Imports Triton, hence imported only where a GPU is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from baton.engine.attention.base import HeadTransform, Rows, Spec, slots_of, tiles_of
from baton.engine.attention.cuda_kernels import attend, write
from baton.engine.attention.plain import split_merged
from baton.engine.kv_pool import KVPool

PREFILL_ROWS = 64
"""Query rows (positions x group) of a prompt's tile."""
KEYS = 64
"""Keys per turn of the kernel's loop."""


class CudaAttention:
    def __init__(self, pool: KVPool, heads: int) -> None:
        self.pool = pool
        self.heads = heads
        self.group = heads // pool.layout.kv_heads
        self.decode_rows = max(16, triton.next_power_of_2(self.group))
        self.prefill_rows = max(PREFILL_ROWS, self.decode_rows)

    def begin(self, rows: Rows) -> CudaStep:
        device = self.pool.pages.device

        def there(array: np.ndarray[Any, Any]) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32)).to(device, non_blocking=True)

        numbers = np.arange(rows.decodes, dtype=np.int32)
        ones = np.ones_like(numbers)
        decodes = np.stack([numbers, numbers, rows.starts[: rows.decodes], ones], 1)
        prompts = tiles_of(rows, self.prefill_rows // self.group)
        slots = slots_of(rows, self.pool.layout.page_size)
        return CudaStep(self, there(slots), there(rows.pages), there(decodes), there(prompts), rows.count)


@dataclass(slots=True)
class CudaStep:
    """Everything a step's kernels read, on the GPU as int32: nothing depends on the layer."""

    owner: CudaAttention
    slots: Tensor
    """[rows]"""
    pages: Tensor
    """[slices, most pages]"""
    decodes: Tensor
    """[decode tiles, 4]"""
    prompts: Tensor
    """[prompt tiles, 4]"""
    rows: int

    @property
    def only_decodes(self) -> bool:
        return len(self.decodes) == self.rows

    def attend_merged(self, spec: Spec, merged: Tensor, transform: HeadTransform) -> Tensor:
        owner = self.owner
        return self.attend(spec, *split_merged(merged, owner.pool.layout, owner.heads, transform)).flatten(1)

    def attend(self, spec: Spec, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        owner, layout = self.owner, self.owner.pool.layout
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        pool = owner.pool.pages
        page_stride, layer_offset = pool.stride(0), spec.layer * pool.stride(1)
        width = triton.next_power_of_2(layout.head_dim)
        grid: tuple[int, int] = (query.shape[0], layout.kv_heads)
        write[grid](
            *(key, value, pool, self.slots, layer_offset, page_stride, key.stride(0), value.stride(0)),
            PAGE_SIZE=layout.page_size,
            KV_HEADS=layout.kv_heads,
            HEAD_DIM=layout.head_dim,
            WIDTH=width,
        )
        out = torch.empty_like(query)
        for tiles, rows in ((self.decodes, owner.decode_rows), (self.prompts, owner.prefill_rows)):
            if len(tiles):
                attend[len(tiles), layout.kv_heads](
                    *(query, pool, out, tiles, self.pages, self.pages.stride(0), layer_offset, page_stride),
                    *(query.stride(0), spec.scale, spec.softcap, spec.window),
                    PAGE_SIZE=layout.page_size,
                    KV_HEADS=layout.kv_heads,
                    GROUP=owner.group,
                    HEAD_DIM=layout.head_dim,
                    WIDTH=width,
                    ROWS=rows,
                    KEYS=KEYS,
                    CAPPED=spec.softcap > 0,
                )
        return out
