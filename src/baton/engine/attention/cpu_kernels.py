"""The CPU attention kernels, float32, made for one head size and one number of query heads per KV head.

A token's K of one KV head is `head_dim` floats, that many floats into the pool:

    page * page_floats + layer_floats + kv_head * page_size * head_dim + (position % page_size) * head_dim

and its V is `kv_heads * page_size * head_dim` further on. Query, key and value come as rows of one matrix (or of
three), `*_stride` floats apart, not rotated yet where cos and sin are given.

Places are byte addresses, and every vector is an array made at its address: an array that is indexed with a computed
(maybe negative, for all the compiler knows) offset would not be vectorised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import carray, types

from baton.engine.attention.tiles import COLUMNS, ROWS, gather_tile, make_blend_tile, make_dot_tile, score_tile
from baton.engine.kernels import exp, f32, floats, inline, ints, pointer, prefetch, take, tanh

TILE = 192
"""Query rows (positions x group) of one prefill task: the vector loops run over them."""
BLOCK = 64
"""Keys that are scored before the softmax is brought up to date."""
NEVER = f32(-1e30)
"""A score that no softmax notices."""

WORDS = "qqqqqqqqqqqqqqqqqqqqqqqqqqdddd"
"""Shared by all kernels of this file; packed by `CpuStep._launch`."""


def _transform(place: Any, weights: Any, eps: Any, cos: Any, sin: Any, head_dim: Any) -> None:
    """RMS norm (if there are weights) and rotary embedding (if there are angles) of one head, in place."""
    data = floats(place, head_dim)
    if weights != 0:
        weight = floats(weights, head_dim)
        total = f32(0.0)
        for d in range(head_dim):
            total += data[d] * data[d]
        factor = f32(1.0) / np.sqrt(total / f32(head_dim) + eps)
        for d in range(head_dim):
            data[d] = data[d] * factor * weight[d]
    if cos != 0:
        half = head_dim // 2
        low, high = floats(place, half), floats(place + 4 * half, half)
        cos_low, cos_high = floats(cos, half), floats(cos + 4 * half, half)
        sin_low, sin_high = floats(sin, half), floats(sin + 4 * half, half)
        for d in range(half):
            x, y = low[d], high[d]
            low[d] = x * cos_low[d] - y * sin_low[d]
            high[d] = y * cos_high[d] + x * sin_high[d]


def _find(
    base: Any, first: Any, count: Any, pages: Any, page_size: Any, page_floats: Any, head_place: Any, head_dim: Any
) -> None:
    """base[j] = address of the K of position first + j and one KV head; `pages` are those of the sequence."""
    page, offset = first // page_size, first % page_size
    for j in range(count):
        base[j] = head_place + 4 * (np.int64(pages[page]) * page_floats + offset * head_dim)
        offset += 1
        if offset == page_size:
            page, offset = page + 1, 0


transform = inline(_transform)
find = inline(_find)


def make_write(head_dim: int, group: int) -> Callable[[Any], None]:
    """Transforms query and key in place and writes key and value into the pages. A task is a run of rows."""

    def write(raw: Any) -> None:
        words = carray(raw, (64,), types.int64)
        numbers = carray(raw, (64,), types.float64)
        rows, run, kv_heads, page_size = words[1], words[2], words[3], words[4]
        page_floats, layer_floats = words[5], words[6]
        q_stride, k_stride, v_stride = words[7], words[8], words[9]
        slots = carray(pointer(words[18]), (rows,), types.int64)
        eps = f32(numbers[27])
        half_bytes = 4 * kv_heads * page_size * head_dim
        while True:
            first = take(raw) * run
            if first >= rows:
                break
            for row in range(first, min(first + run, rows)):
                cos = words[14] + 4 * row * head_dim if words[14] != 0 else 0
                sin = words[15] + 4 * row * head_dim
                page, offset = slots[row] // page_size, slots[row] % page_size
                place = words[10] + 4 * (page * page_floats + layer_floats + offset * head_dim)
                for head in range(kv_heads * group):
                    transform(words[11] + 4 * (row * q_stride + head * head_dim), words[16], eps, cos, sin, head_dim)
                for head in range(kv_heads):
                    source = words[12] + 4 * (row * k_stride + head * head_dim)
                    transform(source, words[17], eps, cos, sin, head_dim)
                    key = floats(source, head_dim)
                    value = floats(words[13] + 4 * (row * v_stride + head * head_dim), head_dim)
                    kept_key = floats(place + 4 * head * page_size * head_dim, head_dim)
                    kept_value = floats(place + 4 * head * page_size * head_dim + half_bytes, head_dim)
                    for d in range(head_dim):
                        kept_key[d] = key[d]
                    for d in range(head_dim):
                        kept_value[d] = value[d]

    return write


def make_decode(head_dim: int, group: int) -> Callable[[Any], None]:
    """One query position per sequence. A task is (row, KV head): its keys and values are read once for the group."""
    width = next(n for n in (3, 2, 1) if group % n == 0)
    dot_tile, blend_tile = make_dot_tile(width, head_dim), make_blend_tile(width, head_dim)

    def decode(raw: Any) -> None:
        words = carray(raw, (64,), types.int64)
        numbers = carray(raw, (64,), types.float64)
        rows, kv_heads, page_size = words[1], words[3], words[4]
        page_floats, layer_floats = words[5], words[6]
        q_stride = words[7]
        most_pages = words[21]
        starts = ints(words[22], rows)
        window = words[23]
        scale, softcap = f32(numbers[28]), f32(numbers[29])
        half_bytes = 4 * kv_heads * page_size * head_dim
        scores = np.empty((group, BLOCK), np.float32)
        sums = np.empty((group, head_dim), np.float32)
        scaled = np.empty((group, head_dim), np.float32)
        most = np.empty(group, np.float32)
        total = np.empty(group, np.float32)
        base = np.empty(BLOCK, np.int64)
        ahead = np.empty(BLOCK, np.int64)
        while True:
            task = take(raw)
            if task >= rows * kv_heads:
                break
            row, head = task // kv_heads, task % kv_heads
            pages = ints(words[20] + 4 * row * most_pages, most_pages)
            end = starts[row] + 1
            begin = max(0, end - window) if window > 0 else 0
            for g in range(group):
                most[g], total[g] = NEVER, f32(0.0)
                query = floats(words[11] + 4 * (row * q_stride + (head * group + g) * head_dim), head_dim)
                for d in range(head_dim):
                    scaled[g, d] = query[d] * scale
                    sums[g, d] = f32(0.0)
            head_place = words[10] + 4 * (layer_floats + head * page_size * head_dim)
            find(base, begin, min(BLOCK, end - begin), pages, page_size, page_floats, head_place, head_dim)
            for block in range(begin, end, BLOCK):
                count = min(BLOCK, end - block)
                coming = max(0, min(BLOCK, end - block - BLOCK))
                find(ahead, block + BLOCK, coming, pages, page_size, page_floats, head_place, head_dim)
                for j in range(count, (count + ROWS - 1) // ROWS * ROWS):
                    base[j] = base[count - 1]  # a tile is whole; what is too much of it is not looked at
                for j in range(0, count, ROWS):
                    for i in range(j, min(j + ROWS, coming)):  # pages lie far apart: ask for the next block's lines now
                        for line in range(0, 4 * head_dim, 64):
                            prefetch(ahead[i] + line)
                            prefetch(ahead[i] + half_bytes + line)
                    for g in range(0, group, width):
                        queries, target = scaled.ctypes.data + 4 * g * head_dim, scores.ctypes.data + 4 * g * BLOCK
                        dot_tile(base.ctypes.data + 8 * j, queries, target + 4 * j, 4 * BLOCK)
                for g in range(group):
                    if softcap > f32(0.0):
                        for j in range(count):
                            scores[g, j] = softcap * tanh(scores[g, j] / softcap)
                    best = most[g]
                    for j in range(count):
                        best = max(best, scores[g, j])
                    keep = exp(most[g] - best)
                    added = f32(0.0)
                    for j in range(count):
                        weight = exp(scores[g, j] - best)
                        scores[g, j] = weight
                        added += weight
                    most[g] = best
                    total[g] = total[g] * keep + added
                    for d in range(head_dim):
                        sums[g, d] *= keep
                for g in range(0, group, width):
                    weights, target = scores.ctypes.data + 4 * g * BLOCK, sums.ctypes.data + 4 * g * head_dim
                    blend_tile(base.ctypes.data, weights, target, 4 * BLOCK, count, half_bytes)
                for j in range(coming):
                    base[j] = ahead[j]
            for g in range(group):
                out = floats(words[19] + 4 * (row * kv_heads * group + head * group + g) * head_dim, head_dim)
                factor = f32(1.0) / total[g]
                for d in range(head_dim):
                    out[d] = sums[g, d] * factor

    return decode


def _score(scores: Any, queries: Any, base: Any, head_dim: Any) -> None:
    """scores[j, r] = sum over d of K[j, d] * queries[d, r], for BLOCK keys."""
    for r in range(0, TILE, COLUMNS):
        for j in range(0, BLOCK, ROWS):
            target = scores.ctypes.data + 4 * (j * TILE + r)
            score_tile(base.ctypes.data + 8 * j, queries.ctypes.data + 4 * r, target, 4 * TILE, head_dim)


def _gather(sums: Any, weights: Any, base: Any, head_dim: Any) -> None:
    """sums[d, r] += sum over j of V[j, d] * weights[j, r], for BLOCK values."""
    for r in range(0, TILE, COLUMNS):
        for d in range(0, head_dim, ROWS):
            target = sums.ctypes.data + 4 * (d * TILE + r)
            gather_tile(base.ctypes.data, weights.ctypes.data + 4 * r, target, 4 * TILE, BLOCK, 4 * d)


score_block = inline(_score)
gather_block = inline(_gather)


def make_prefill(head_dim: int, group: int) -> Callable[[Any], None]:
    """Many query positions per sequence. A task is (tile of positions, KV head), computed transposed: keys and values
    are scalars straight from their pages, and the vectors run along the tile's TILE query rows."""
    span = TILE // group

    def prefill(raw: Any) -> None:
        words = carray(raw, (64,), types.int64)
        numbers = carray(raw, (64,), types.float64)
        tiles, kv_heads, page_size = words[1], words[3], words[4]
        page_floats, layer_floats = words[5], words[6]
        q_stride = words[7]
        most_pages = words[21]
        table = carray(pointer(words[22]), (tiles, 4), types.int64)  # slice, first row, first position, count
        window = words[23]
        scale, softcap = f32(numbers[28]), f32(numbers[29])
        half_bytes = 4 * kv_heads * page_size * head_dim
        queries = np.empty((head_dim, TILE), np.float32)
        sums = np.empty((head_dim, TILE), np.float32)
        scores = np.empty((BLOCK, TILE), np.float32)
        most = np.empty(TILE, np.float32)
        best = np.empty(TILE, np.float32)
        total = np.empty(TILE, np.float32)
        position_of = np.empty(TILE, np.int32)
        base = np.empty(BLOCK, np.int64)
        while True:
            task = take(raw)
            if task >= tiles * kv_heads:
                break
            head = task % kv_heads
            tile = table[task // kv_heads]
            owner, first_row, first, count = tile[0], tile[1], tile[2], tile[3]
            pages = ints(words[20] + 4 * owner * most_pages, most_pages)
            end = first + count
            begin = max(0, first - window + 1) // BLOCK * BLOCK if window > 0 else 0  # the same blocks for every tile
            for r in range(TILE):
                at = min(r // group, count - 1)
                position_of[r] = first + at
                column = (head * group + r % group) * head_dim
                query = floats(words[11] + 4 * ((first_row + at) * q_stride + column), head_dim)
                for d in range(head_dim):
                    queries[d, r] = query[d] * scale
                most[r], total[r] = NEVER, f32(0.0)
            sums[:] = f32(0.0)
            head_place = words[10] + 4 * (layer_floats + head * page_size * head_dim)
            for block in range(begin, end, BLOCK):
                seen = min(BLOCK, end - block)
                find(base, block, seen, pages, page_size, page_floats, head_place, head_dim)
                for j in range(seen, BLOCK):
                    base[j] = base[seen - 1]
                score_block(scores, queries, base, head_dim)
                if softcap > f32(0.0):
                    for j in range(BLOCK):
                        for r in range(TILE):
                            scores[j, r] = softcap * tanh(scores[j, r] / softcap)
                if block + BLOCK > first or (window > 0 and block <= end - window):
                    for j in range(BLOCK):
                        position = block + j
                        for r in range(TILE):
                            distance = position_of[r] - position
                            if distance < 0 or (window > 0 and distance >= window):
                                scores[j, r] = NEVER
                for r in range(TILE):
                    best[r] = most[r]
                for j in range(BLOCK):
                    for r in range(TILE):
                        best[r] = max(best[r], scores[j, r])
                for r in range(TILE):
                    most[r] = exp(most[r] - best[r])
                    total[r] *= most[r]
                for d in range(head_dim):
                    for r in range(TILE):
                        sums[d, r] *= most[r]
                for j in range(BLOCK):
                    for r in range(TILE):
                        weight = exp(scores[j, r] - best[r])
                        scores[j, r] = weight
                        total[r] += weight
                for r in range(TILE):
                    most[r] = best[r]
                for j in range(BLOCK):
                    base[j] += half_bytes
                gather_block(sums, scores, base, head_dim)
            for r in range(count * group):
                factor = f32(1.0) / total[r]
                row = (first_row + r // group) * kv_heads * group + head * group + r % group
                out = floats(words[19] + 4 * row * head_dim, head_dim)
                for d in range(head_dim):
                    out[d] = sums[d, r] * factor

    assert span > 0, "more than TILE query heads per KV head"
    return prefill
