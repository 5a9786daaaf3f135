"""The inner products of attention, in registers."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from baton.engine.registers import (
    FLOAT,
    LANES,
    WIDE,
    WORD,
    add_product,
    load,
    multiply,
    new_sums,
    store,
    total,
    words_at,
)

ROWS, VECTORS = 4, 4 if WIDE else 3
"""ROWS x VECTORS sums, VECTORS operands and a scalar fit into the registers."""
COLUMNS = LANES * VECTORS


def _score_tile(_typing: Any, keys: Any, queries: Any, scores: Any, stride: Any, depth: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        keys, queries, scores, stride, depth = values
        sums = new_sums(builder, ROWS, VECTORS)
        rows = words_at(builder, keys, ROWS)

        def left(step: Any, i: int) -> Any:
            return builder.add(rows[i], builder.mul(step, WORD(4)))

        def right(step: Any) -> Any:
            row = builder.add(queries, builder.mul(step, stride))
            return [load(builder, row, v) for v in range(VECTORS)]

        multiply(builder, depth, left, right, sums)
        for i in range(ROWS):
            target = builder.add(scores, builder.mul(stride, WORD(i)))
            for v in range(VECTORS):
                store(builder, builder.load(sums[i][v]), target, v)

    word = types.int64
    return types.void(word, word, word, word, word), generate


def _gather_tile(_typing: Any, values: Any, weights: Any, target: Any, stride: Any, depth: Any, offset: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        values, weights, target, stride, depth, offset = arguments
        sums = new_sums(builder, ROWS, VECTORS)
        places = [builder.add(target, builder.mul(stride, WORD(i))) for i in range(ROWS)]
        for i in range(ROWS):
            for v in range(VECTORS):
                builder.store(load(builder, places[i], v), sums[i][v])
        words = builder.inttoptr(values, WORD.as_pointer())

        def left(step: Any, i: int) -> Any:
            row = builder.load(builder.gep(words, [step]))
            return builder.add(builder.add(row, offset), WORD(4 * i))

        def right(step: Any) -> Any:
            row = builder.add(weights, builder.mul(step, stride))
            return [load(builder, row, v) for v in range(VECTORS)]

        multiply(builder, depth, left, right, sums)
        for i in range(ROWS):
            for v in range(VECTORS):
                store(builder, builder.load(sums[i][v]), places[i], v)

    word = types.int64
    return types.void(word, word, word, word, word, word), generate


score_tile = intrinsic(_score_tile)
"""score_tile(keys, queries, scores, stride, depth), all int64: scores[i, c] = sum over d < depth of K_i[d] *
queries[d, c], for i < ROWS and c < COLUMNS. `keys` is the address of ROWS addresses of rows of K; `queries` and
`scores` are addresses of matrices whose rows are `stride` bytes apart."""
gather_tile = intrinsic(_gather_tile)
"""gather_tile(values, weights, target, stride, depth, offset): target[i, c] += sum over j < depth of
V_j[offset / 4 + i] * weights[j, c]. `values` is the address of `depth` addresses of rows of V."""


# --- one query position: vectors along the head -------------------------------------------------------------------


def lanes_of(head_dim: int) -> int:
    """A head is a multiple of 8 floats; a multiple of 16 is taken in wider vectors where there are some."""
    return LANES if head_dim % LANES == 0 else 8


def make_dot_tile(width: int, head_dim: int) -> Any:
    """dot_tile(keys, queries, scores, stride), all int64: scores[g, i] = K_i . queries[g], for g < width and i < ROWS.
    `keys` is the address of ROWS addresses of rows of K, `queries` that of a matrix [width, head_dim], and rows of
    `scores` are `stride` bytes apart."""
    lanes = lanes_of(head_dim)

    def dot_tile(_typing: Any, keys: Any, queries: Any, scores: Any, stride: Any) -> Any:
        def generate(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
            keys, queries, scores, stride = values
            sums = new_sums(builder, ROWS, width, lanes)
            rows = words_at(builder, keys, ROWS)
            with cgutils.for_range(builder, WORD(head_dim // lanes)) as loop:
                at = builder.mul(loop.index, WORD(4 * lanes))
                query = builder.add(queries, at)
                each = [load(builder, builder.add(query, WORD(4 * head_dim * g)), 0, lanes) for g in range(width)]
                for i in range(ROWS):
                    key = load(builder, builder.add(rows[i], at), 0, lanes)
                    for g in range(width):
                        add_product(builder, key, each[g], sums[i][g])
            for g in range(width):
                for i in range(ROWS):
                    place = builder.add(builder.add(scores, builder.mul(stride, WORD(g))), WORD(4 * i))
                    score = total(builder, builder.load(sums[i][g]))
                    builder.store(score, builder.inttoptr(place, ir.PointerType(FLOAT)))

        word = types.int64
        return types.void(word, word, word, word), generate

    return intrinsic(dot_tile)


def make_blend_tile(width: int, head_dim: int) -> Any:
    """blend_tile(values, weights, target, stride, count, offset): target[g] += sum over j < count of weights[g, j] *
    V_j, for g < width. `values` is the address of `count` addresses, V_j lies `offset` bytes beyond; `target` is that
    of a matrix [width, head_dim], and rows of `weights` are `stride` bytes apart."""
    lanes = lanes_of(head_dim)
    vectors = next(n for n in (4, 3, 2, 1) if head_dim // lanes % n == 0)

    def blend_tile(_typing: Any, values: Any, weights: Any, target: Any, stride: Any, count: Any, offset: Any) -> Any:
        def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            values, weights, target, stride, count, offset = arguments
            words = builder.inttoptr(values, WORD.as_pointer())
            rows = [builder.add(weights, builder.mul(stride, WORD(g))) for g in range(width)]
            with cgutils.for_range(builder, WORD(head_dim // lanes // vectors)) as part:
                at = builder.mul(part.index, WORD(4 * lanes * vectors))
                places = [builder.add(builder.add(target, at), WORD(4 * head_dim * g)) for g in range(width)]
                sums = new_sums(builder, width, vectors, lanes)
                for g in range(width):
                    for v in range(vectors):
                        builder.store(load(builder, places[g], v, lanes), sums[g][v])
                shift = builder.add(offset, at)

                def left(step: Any, g: int) -> Any:
                    return builder.add(rows[g], builder.mul(step, WORD(4)))

                def right(step: Any) -> Any:
                    row = builder.add(builder.load(builder.gep(words, [step])), shift)
                    return [load(builder, row, v, lanes) for v in range(vectors)]

                multiply(builder, count, left, right, sums)
                for g in range(width):
                    for v in range(vectors):
                        store(builder, builder.load(sums[g][v]), places[g], v)

        word = types.int64
        return types.void(word, word, word, word, word, word), generate

    return intrinsic(blend_tile)
