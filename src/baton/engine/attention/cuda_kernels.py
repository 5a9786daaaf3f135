"""The GPU attention kernels, in Triton. Imported only where a GPU is used.

Two kernels do everything. `write` puts keys and values into their pages. `attend` computes one tile: some consecutive
positions of one sequence, for all query heads of one KV head, against that sequence's pages; a decode step is a tile
of one position, a chunk of a prompt is cut into tiles. So each K and V block is read once per KV head's group.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def write(
    key: Any,
    value: Any,
    pool: Any,
    slots: Any,
    layer_offset: Any,
    page_stride: Any,
    key_stride: Any,
    value_stride: Any,
    PAGE_SIZE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """Program (row, KV head): `slots[row]` is page * PAGE_SIZE + offset. WIDTH: HEAD_DIM's next power of two."""
    row, head = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    d = tl.arange(0, WIDTH)
    inside = d < HEAD_DIM
    place = slot // PAGE_SIZE * page_stride + layer_offset + (head * PAGE_SIZE + slot % PAGE_SIZE) * HEAD_DIM + d
    k = tl.load(key + row * key_stride + head * HEAD_DIM + d, mask=inside)
    v = tl.load(value + row * value_stride + head * HEAD_DIM + d, mask=inside)
    tl.store(pool + place, k, mask=inside)
    tl.store(pool + place + KV_HEADS * PAGE_SIZE * HEAD_DIM, v, mask=inside)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def attend(
    query: Any,
    pool: Any,
    out: Any,
    tiles: Any,
    pages: Any,
    most_pages: Any,
    layer_offset: Any,
    page_stride: Any,
    query_stride: Any,
    scale: Any,
    softcap: Any,
    window: Any,
    PAGE_SIZE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CAPPED: tl.constexpr,
) -> None:
    """Program (tile, KV head); `tiles` [tiles, 4]: slice, first row, first position, positions.

    ROWS: query rows (positions x GROUP, padded); KEYS: keys per turn of the loop; both powers of two, 16 or more.
    """
    tile, head = tl.program_id(0), tl.program_id(1)
    owner = tl.load(tiles + tile * 4)
    first_row = tl.load(tiles + tile * 4 + 1)
    first = tl.load(tiles + tile * 4 + 2)
    count = tl.load(tiles + tile * 4 + 3)
    r = tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    j = tl.arange(0, KEYS)
    at = r // GROUP
    alive = at < count
    position = first + at
    column = (head * GROUP + r % GROUP) * HEAD_DIM
    source = (first_row + at).to(tl.int64) * query_stride + column
    q = tl.load(query + source[:, None] + d[None, :], mask=alive[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    most = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    end = first + count
    begin = 0
    if window > 0:
        begin = tl.maximum(0, first - window + 1)
    for block in range(begin, end, KEYS):
        key_at = block + j
        there = key_at < end
        page = tl.load(pages + owner * most_pages + key_at // PAGE_SIZE, mask=there, other=0).to(tl.int64)
        place = page * page_stride + layer_offset + (head * PAGE_SIZE + key_at % PAGE_SIZE) * HEAD_DIM
        both = there[:, None] & (d < HEAD_DIM)[None, :]
        k = tl.load(pool + place[:, None] + d[None, :], mask=both, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if CAPPED:
            scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)  # tanh
        distance = position[:, None] - key_at[None, :]
        seen = (distance >= 0) & there[None, :]
        if window > 0:
            seen = seen & (distance < window)
        scores = tl.where(seen, scores, -1e30)
        best = tl.maximum(most, tl.max(scores, 1))
        weights = tl.where(seen, tl.exp(scores - best[:, None]), 0.0)
        keep = tl.exp(most - best)
        total = total * keep + tl.sum(weights, 1)
        v = tl.load(pool + place[:, None] + KV_HEADS * PAGE_SIZE * HEAD_DIM + d[None, :], mask=both, other=0.0)
        sums = sums * keep[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        most = best
    answer = sums / tl.maximum(total, 1e-30)[:, None]
    target = (first_row + at).to(tl.int64) * (KV_HEADS * GROUP * HEAD_DIM) + column
    both = alive[:, None] & (d < HEAD_DIM)[None, :]
    tl.store(out + target[:, None] + d[None, :], answer.to(out.dtype.element_ty), mask=both)
