"""Tiles of sums that stay in vector registers.

numba cannot say "these twelve sums stay in registers", so the inner loops of products are written in LLVM's own
language: a tile of rows x vectors of sums is kept while the loop over the inner dimension runs. Each turn loads one row
of vectors and one scalar per row of the tile, and multiplies each with each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils

WIDE = bool(llvm.get_host_cpu_features().get("avx512f"))
LANES = 16 if WIDE else 8

FLOAT, WORD, BYTE = ir.FloatType(), ir.IntType(64), ir.IntType(8)
VECTOR = ir.VectorType(FLOAT, LANES)
FLAGS = ("contract",)

Left = Callable[[Any, int], Any]
"""(step, row of the tile) -> address of the scalar."""
Right = Callable[[Any], Sequence[Any]]
"""step -> the row of vectors."""
Sums = list[list[Any]]
"""Places of the tile's sums, [rows][vectors]; LLVM keeps them in registers."""


def vector_at(builder: Any, address: Any, index: int, kind: Any = FLOAT, lanes: int = LANES) -> Any:
    """Pointer to the vector number `index` of elements of `kind` from `address` on."""
    size = 4 if kind is FLOAT else kind.width // 8
    place = builder.add(address, WORD(size * lanes * index))
    return builder.inttoptr(place, ir.VectorType(kind, lanes).as_pointer())


def load(builder: Any, address: Any, index: int, lanes: int = LANES) -> Any:
    return builder.load(vector_at(builder, address, index, lanes=lanes), align=4)


def store(builder: Any, value: Any, address: Any, index: int) -> None:
    builder.store(value, vector_at(builder, address, index, lanes=value.type.count), align=4)


def words_at(builder: Any, address: Any, count: int) -> list[Any]:
    """The `count` int64 from `address` on."""
    words = builder.inttoptr(address, WORD.as_pointer())
    return [builder.load(builder.gep(words, [WORD(i)])) for i in range(count)]


def new_sums(builder: Any, rows: int, vectors: int, lanes: int = LANES) -> Sums:
    """All zero."""
    kind = ir.VectorType(FLOAT, lanes)
    sums = [[cgutils.alloca_once(builder, kind) for _ in range(vectors)] for _ in range(rows)]
    for row in sums:
        for place in row:
            builder.store(ir.Constant(kind, [0.0] * lanes), place)
    return sums


def multiply(builder: Any, depth: Any, left: Left, right: Right, sums: Sums) -> None:
    """sums[i][v] += sum over step < depth of left(step, i) * right(step)[v], in the order of the steps."""

    def turn(step: Any) -> None:
        vectors = right(step)
        for i, row in enumerate(sums):
            factor = _spread(builder, left(step, i), vectors[0].type)
            for vector, place in zip(vectors, row):
                add_product(builder, factor, vector, place)

    pairs = builder.udiv(depth, WORD(2))
    with cgutils.for_range(builder, pairs) as loop:
        step = builder.mul(loop.index, WORD(2))
        turn(step)
        turn(builder.add(step, WORD(1)))
    done = builder.mul(pairs, WORD(2))
    with cgutils.for_range(builder, builder.sub(depth, done)) as loop:
        turn(builder.add(done, loop.index))


def add_product(builder: Any, a: Any, b: Any, place: Any) -> None:
    """The sum at `place` += a * b"""
    product = builder.fmul(a, b, flags=FLAGS)
    builder.store(builder.fadd(builder.load(place), product, flags=FLAGS), place)


def total(builder: Any, vector: Any) -> Any:
    """The sum over all lanes, in a fixed order."""
    kind = ir.FunctionType(FLOAT, (FLOAT, vector.type))
    name = f"llvm.vector.reduce.fadd.v{vector.type.count}f32"
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, (FLOAT(-0.0), vector), fastmath=("reassoc",))


def _spread(builder: Any, address: Any, kind: Any) -> Any:
    """The float at `address` in all lanes of a vector of type `kind`."""
    scalar = builder.load(builder.inttoptr(address, FLOAT.as_pointer()))
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.IntType(32)(0))
    lanes = ir.Constant(ir.VectorType(ir.IntType(32), kind.count), [0] * kind.count)
    return builder.shuffle_vector(one, one, lanes)


def prefetch(builder: Any, address: Any) -> None:
    """Start to load the cache line at `address`; harmless whatever it is."""
    flag = ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), (cgutils.voidptr_t, flag, flag, flag))
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, (builder.inttoptr(address, cgutils.voidptr_t), flag(0), flag(3), flag(1)))
