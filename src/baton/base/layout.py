"""What one KV pool looks like: enough to compute where every byte of a page is, and to compare two pools."""

from __future__ import annotations

import msgspec

ITEM_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


class KVLayout(msgspec.Struct, frozen=True, array_like=True):
    """A pool is `num_pages` pages, page-major: a page holds all layers of its tokens in one piece,
    as [layers, 2 (K, V), kv_heads, page_size, head_dim]. One page is one copy when it travels."""

    fingerprint: str
    """Of the model's configuration and weights: pools of different models never exchange pages."""
    layers: int
    kv_heads: int
    head_dim: int
    page_size: int
    dtype: str

    @property
    def page_bytes(self) -> int:
        return self.layers * 2 * self.kv_heads * self.page_size * self.head_dim * ITEM_SIZES[self.dtype]

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def difference(self, other: KVLayout) -> str:
        """Readable list of the fields that differ, `""` if none: `page_size 16 here, 32 there`."""
        return "; ".join(
            f"{name} {getattr(self, name)} here, {getattr(other, name)} there"
            for name in self.__struct_fields__
            if getattr(self, name) != getattr(other, name)
        )
