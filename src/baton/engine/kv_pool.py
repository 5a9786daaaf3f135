"""The memory behind the pages. Who may use which page is `PagePool`'s business (blocks.py); here are the bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from baton.base.errors import ConfigError
from baton.base.layout import KVLayout

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class KVPool:
    """`pages`: [num_pages, layers, 2 (K, V), kv_heads, page_size, head_dim], contiguous, as `KVLayout` says.

    On the CPU `memory` is a writable buffer of `pool_bytes` that the process owns and may share with others (a peer
    writes arriving pages straight into it); it must stay mapped as long as the pool is used. Without it, and on a
    GPU, the pool allocates its own.
    """

    def __init__(
        self,
        layout: KVLayout,
        num_pages: int,
        memory: memoryview | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.layout = layout
        self.num_pages = num_pages
        device = device or torch.device("cpu")
        shape = (num_pages, layout.layers, 2, layout.kv_heads, layout.page_size, layout.head_dim)
        if memory is None:
            self.pages = torch.zeros(shape, dtype=DTYPES[layout.dtype], device=device)
        else:
            self.pages = _view(memory, layout, num_pages).view(shape)

    def layer(self, index: int) -> Tensor:
        """[num_pages, 2, kv_heads, page_size, head_dim] of one layer, a view."""
        return self.pages[:, index]

    def __repr__(self) -> str:
        return f"<KVPool {self.num_pages} pages of {self.layout.page_bytes} bytes on {self.pages.device}>"


def pool_bytes(layout: KVLayout, num_pages: int) -> int:
    """What `memory` must hold."""
    return layout.page_bytes * num_pages


def _view(memory: memoryview, layout: KVLayout, num_pages: int) -> Tensor:
    needed = pool_bytes(layout, num_pages)
    if memory.readonly:
        raise ConfigError("the KV pool's memory is read-only; it must be a writable buffer")
    if memory.nbytes < needed:
        raise ConfigError(f"the KV pool's memory has {memory.nbytes} bytes; {num_pages} pages need {needed}")
    return torch.frombuffer(memory.cast("B"), dtype=torch.uint8, count=needed).view(DTYPES[layout.dtype])
