"""The inner products of prompt attention, in registers.

numba cannot say "sixteen accumulators stay in vector registers", so these two are written in LLVM's own language: a
tile of 4 x COLUMNS sums is kept in registers while the loop over the inner dimension runs. Each turn of the loop loads
one row of vectors and four scalars, and multiplies each with each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

WIDE = bool(llvm.get_host_cpu_features().get("avx512f"))
LANES = 16 if WIDE else 8
VECTORS = 4 if WIDE else 2
"""Per row of the tile: 4 x VECTORS accumulators, VECTORS operands and a scalar fit into the registers."""
COLUMNS = LANES * VECTORS
ROWS = 4

FLOAT, WORD = ir.FloatType(), ir.IntType(64)
VECTOR = ir.VectorType(FLOAT, LANES)
FLAGS = ("contract",)

Place = Callable[[Any, Any], Any]


def _vector_at(builder: Any, address: Any, index: int) -> Any:
    place = builder.add(address, WORD(4 * LANES * index))
    return builder.inttoptr(place, VECTOR.as_pointer())


def _spread(builder: Any, address: Any) -> Any:
    """The float at `address` in all lanes."""
    scalar = builder.load(builder.inttoptr(address, FLOAT.as_pointer()))
    one = builder.insert_element(ir.Constant(VECTOR, ir.Undefined), scalar, ir.IntType(32)(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES))


def _multiply(builder: Any, depth: Any, left: Callable[[Any, int], Any], right: Any, stride: Any, sums: Any) -> None:
    """sums[i][v] += sum over step of left(step, i) * vector v of the row at right + step * stride."""
    with cgutils.for_range(builder, depth) as loop:
        row = builder.add(right, builder.mul(loop.index, stride))
        vectors = [builder.load(_vector_at(builder, row, v), align=4) for v in range(VECTORS)]
        for i in range(ROWS):
            factor = _spread(builder, left(loop.index, i))
            for v in range(VECTORS):
                product = builder.fmul(factor, vectors[v], flags=FLAGS)
                builder.store(builder.fadd(builder.load(sums[i][v]), product, flags=FLAGS), sums[i][v])


def _accumulators(builder: Any) -> Any:
    return [[cgutils.alloca_once(builder, VECTOR) for _ in range(VECTORS)] for _ in range(ROWS)]


def _score_tile(_typing: Any, keys: Any, queries: Any, scores: Any, stride: Any, depth: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        keys, queries, scores, stride, depth = values
        sums = _accumulators(builder)
        for row in sums:
            for place in row:
                builder.store(ir.Constant(VECTOR, [0.0] * LANES), place)
        words = builder.inttoptr(keys, WORD.as_pointer())
        rows = [builder.load(builder.gep(words, [WORD(i)])) for i in range(ROWS)]
        _multiply(
            builder, depth, lambda step, i: builder.add(rows[i], builder.mul(step, WORD(4))), queries, stride, sums
        )
        for i in range(ROWS):
            target = builder.add(scores, builder.mul(stride, WORD(i)))
            for v in range(VECTORS):
                builder.store(builder.load(sums[i][v]), _vector_at(builder, target, v), align=4)

    word = types.int64
    return types.void(word, word, word, word, word), generate


def _gather_tile(_typing: Any, values: Any, weights: Any, target: Any, stride: Any, depth: Any, offset: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        values, weights, target, stride, depth, offset = arguments
        sums = _accumulators(builder)
        places = [builder.add(target, builder.mul(stride, WORD(i))) for i in range(ROWS)]
        for i in range(ROWS):
            for v in range(VECTORS):
                builder.store(builder.load(_vector_at(builder, places[i], v), align=4), sums[i][v])
        words = builder.inttoptr(values, WORD.as_pointer())

        def left(step: Any, i: int) -> Any:
            row = builder.load(builder.gep(words, [step]))
            return builder.add(builder.add(row, offset), WORD(4 * i))

        _multiply(builder, depth, left, weights, stride, sums)
        for i in range(ROWS):
            for v in range(VECTORS):
                builder.store(builder.load(sums[i][v]), _vector_at(builder, places[i], v), align=4)

    word = types.int64
    return types.void(word, word, word, word, word, word), generate


score_tile = intrinsic(_score_tile)
"""score_tile(keys, queries, scores, stride, depth), all int64: scores[i, c] = sum over d < depth of K_i[d] *
queries[d, c], for i < ROWS and c < COLUMNS. `keys` is the address of ROWS addresses of rows of K; `queries` and
`scores` are addresses of matrices whose rows are `stride` bytes apart."""
gather_tile = intrinsic(_gather_tile)
"""gather_tile(values, weights, target, stride, depth, offset): target[i, c] += sum over j < depth of
V_j[offset / 4 + i] * weights[j, c]. `values` is the address of `depth` addresses of rows of V."""
