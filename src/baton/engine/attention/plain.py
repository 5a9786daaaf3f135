"""Attention in plain torch: any device, any dtype, no cleverness. The kernels are tested against it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from baton.base.layout import KVLayout
from baton.engine.attention.base import HeadTransform, Rows, Spec
from baton.engine.kv_pool import KVPool


class PlainAttention:
    def __init__(self, pool: KVPool, heads: int) -> None:
        self.pool = pool
        self.heads = heads

    def begin(self, rows: Rows) -> PlainStep:
        return PlainStep(self.pool, self.heads, rows)


class PlainStep:
    def __init__(self, pool: KVPool, heads: int, rows: Rows) -> None:
        self.pool = pool
        self.heads = heads
        self.rows = rows
        device = pool.pages.device
        self._pages = torch.from_numpy(rows.pages).long().to(device)
        self._positions = torch.from_numpy(rows.positions).to(device)
        slices = torch.repeat_interleave(torch.arange(len(rows.counts)), torch.from_numpy(rows.counts).long())
        page_size = pool.layout.page_size
        self._row_pages = self._pages[slices.to(device), self._positions // page_size]
        self._row_offsets = self._positions % page_size

    def attend(self, spec: Spec, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self._write(spec.layer, key, value)
        outputs = []
        for index, (first, count) in enumerate(zip(self.rows.first_rows, self.rows.counts, strict=True)):
            length = int(self.rows.starts[index] + count)
            rows = slice(int(first), int(first + count))
            keys, values = self._read(spec.layer, index, length)
            outputs.append(_attend(spec, query[rows], keys, values, self._positions[rows]))
        return torch.cat(outputs)

    def attend_merged(self, spec: Spec, merged: Tensor, transform: HeadTransform) -> Tensor:
        return self.attend(spec, *split_merged(merged, self.pool.layout, self.heads, transform)).flatten(1)

    def _write(self, layer: int, key: Tensor, value: Tensor) -> None:
        pages = self.pool.layer(layer)
        pages[self._row_pages, 0, :, self._row_offsets] = key.to(pages.dtype)
        pages[self._row_pages, 1, :, self._row_offsets] = value.to(pages.dtype)

    def _read(self, layer: int, index: int, length: int) -> tuple[Tensor, Tensor]:
        """K and V of a slice's sequence: [kv_heads, length, head_dim] each."""
        used = -(-length // self.pool.layout.page_size)
        pages = self.pool.layer(layer)[self._pages[index, :used]]  # [used, 2, kv_heads, page_size, head_dim]
        keys, values = pages.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length]
        return keys, values


def split_merged(
    merged: Tensor, layout: KVLayout, heads: int, transform: HeadTransform
) -> tuple[Tensor, Tensor, Tensor]:
    """query [rows, heads, head_dim], key and value [rows, kv_heads, head_dim], normed and rotated."""
    parts = merged.view(merged.shape[0], -1, layout.head_dim)
    query, key, value = torch.split(parts, [heads, layout.kv_heads, layout.kv_heads], 1)
    query = _rotate(_norm(query, transform.query_norm, transform.eps), transform)
    return query, _rotate(_norm(key, transform.key_norm, transform.eps), transform), value


def _norm(heads: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return heads
    return F.rms_norm(heads.float(), weight.shape, weight.float(), eps).to(heads.dtype)


def _rotate(heads: Tensor, transform: HeadTransform) -> Tensor:
    half = heads.shape[-1] // 2
    turned = torch.cat((-heads[..., half:], heads[..., :half]), -1)
    return heads * transform.cos[0, :, None] + turned * transform.sin[0, :, None]


def _attend(spec: Spec, query: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """query [rows, heads, head_dim] at `positions` over keys and values [kv_heads, length, head_dim]."""
    rows, heads, head_dim = query.shape
    kv_heads, length, _ = keys.shape
    grouped = query.transpose(0, 1).reshape(kv_heads, -1, head_dim)  # [kv_heads, group * rows, head_dim]
    scores = (grouped.float() @ keys.float().transpose(1, 2) * spec.scale).view(kv_heads, -1, rows, length)
    if spec.softcap:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    distance = positions[:, None] - torch.arange(length, device=keys.device)
    hidden = distance < 0
    if spec.window:
        hidden |= distance >= spec.window
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).view(kv_heads, -1, length)
    output: Tensor = weights @ values.float()  # [kv_heads, group * rows, head_dim]
    return output.reshape(heads, rows, head_dim).transpose(0, 1).to(query.dtype)
