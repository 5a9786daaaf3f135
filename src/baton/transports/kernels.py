"""Copy pages and digest them in one pass over the bytes, without the GIL.

The digest is XXH3-64 (seed 0) of each piece, the very value that any xxHash library gives, so that whoever receives
a page can check it with what he has. It is computed in the registers that carry the bytes across, 64 bytes (a
stripe) at a time; stores go past the cache, because the next reader is another process on another core.

    piece   |- block: 16 stripes, then scramble -|- block -| ... |- up to 16 stripes -|, and the last 64 bytes once more
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, TypeAlias

import numba
import numpy as np
import numpy.typing as npt
import xxhash
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

Pieces: TypeAlias = npt.NDArray[np.int64]
"""[n, 3]: local offset, remote offset, length in bytes."""
Digests: TypeAlias = npt.NDArray[np.uint64]

SHORT = 240
"""XXH3 treats inputs up to this length in other ways; the library does those (real pages are longer)."""
_STRIPE, _BLOCK = 64, 1024
_LOOKAHEAD = 4
"""Blocks. The processor fetches ahead within 4 KB at best; scattered pages need a hint (a third faster)."""
_P32_1, _P32_2, _P32_3 = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D
_P64_1, _P64_2, _P64_3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
_P64_4, _P64_5 = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5
_START = (_P32_3, _P64_1, _P64_2, _P64_3, _P64_4, _P32_2, _P64_5, _P32_1)
_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
    "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb"
    "170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
"""The algorithm's public constant."""
_LAST_BLOCK_KEY = len(_SECRET) - _STRIPE
_LAST_STRIPE_KEY = len(_SECRET) - _STRIPE - 7
_MERGE_KEY = 11

_I64 = ir.IntType(64)
_HALF = ir.VectorType(_I64, 4)
"""Half a stripe; two of them are the accumulators."""
_PAST_THE_CACHE = [ir.Constant(ir.IntType(32), 1)]


def _word(offset: int) -> int:
    return int.from_bytes(_SECRET[offset : offset + 8], "little")


def _key(offset: int, half: int) -> ir.Constant:
    words = [_word(offset + 32 * half + 8 * lane) for lane in range(4)]
    return ir.Constant(_HALF, [ir.Constant(_I64, word) for word in words])


def _splat(value: int) -> ir.Constant:
    return ir.Constant(_HALF, [ir.Constant(_I64, value)] * 4)


class _Emitter:
    """Writes the vector code of one intrinsic: addresses are 64-bit integers, accumulators live at `acc`."""

    def __init__(self, builder: Any, acc: Any) -> None:
        self.builder = builder
        self._acc = acc
        self.halves = [builder.load(self._at(acc, 32 * half), align=8) for half in (0, 1)]

    def stripe(self, source: Any, target: Any | None, offset: int, key: int) -> None:
        """Load one stripe, store it at `target` if there is one, mix it into the accumulators."""
        for half in (0, 1):
            place = offset + 32 * half
            data = self.builder.load(self._at(source, place), align=1)
            if target is not None:
                store = self.builder.store(data, self._at(target, place), align=32)
                store.set_metadata("nontemporal", self.builder.module.add_metadata(_PAST_THE_CACHE))
            self._mix(half, data, _key(key, half))

    def prefetch(self, address: Any) -> None:
        """Ask for the block at `address` (any address: a wrong one costs nothing and never faults)."""
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        ask = cgutils.get_or_insert_function(
            self.builder.module, ir.FunctionType(ir.VoidType(), [byte, number, number, number]), "llvm.prefetch.p0"
        )
        for place in range(0, _BLOCK, _STRIPE):
            line = self.builder.inttoptr(self.builder.add(address, ir.Constant(_I64, place)), byte)
            self.builder.call(ask, [line, number(0), number(3), number(1)])

    def scramble(self) -> None:
        for half in (0, 1):
            acc = self.halves[half]
            mixed = self.builder.xor(acc, self.builder.lshr(acc, _splat(47)))
            mixed = self.builder.xor(mixed, _key(_LAST_BLOCK_KEY, half))
            self.halves[half] = self.builder.mul(mixed, _splat(_P32_1))

    def done(self) -> None:
        for half in (0, 1):
            self.builder.store(self.halves[half], self._at(self._acc, 32 * half), align=8)

    def _mix(self, half: int, data: Any, key: Any) -> None:
        builder = self.builder
        keyed = builder.xor(data, key)
        product = builder.mul(builder.and_(keyed, _splat(0xFFFFFFFF)), builder.lshr(keyed, _splat(32)))
        order = ir.Constant(ir.VectorType(ir.IntType(32), 4), [1, 0, 3, 2])
        swapped = builder.shuffle_vector(data, ir.Constant(_HALF, ir.Undefined), order)
        self.halves[half] = builder.add(self.halves[half], builder.add(swapped, product))

    def _at(self, address: Any, offset: int) -> Any:
        moved = self.builder.add(address, ir.Constant(_I64, offset)) if offset else address
        return self.builder.inttoptr(moved, _HALF.as_pointer())


@intrinsic  # type: ignore[untyped-decorator]
def _copy_block(typing: Any, acc: Any, source: Any, target: Any, ahead: Any) -> Any:
    """16 stripes to `target` (32-byte aligned) and into the accumulators, then the scramble."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        code = _Emitter(builder, args[0])
        code.prefetch(args[3])
        for number in range(_BLOCK // _STRIPE):
            code.stripe(args[1], args[2], number * _STRIPE, number * 8)
        code.scramble()
        code.done()
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), emit


@intrinsic  # type: ignore[untyped-decorator]
def _read_block(typing: Any, acc: Any, source: Any, ahead: Any) -> Any:
    """As `_copy_block`, without the copy."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        code = _Emitter(builder, args[0])
        code.prefetch(args[2])
        for number in range(_BLOCK // _STRIPE):
            code.stripe(args[1], None, number * _STRIPE, number * 8)
        code.scramble()
        code.done()
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), emit


@intrinsic  # type: ignore[untyped-decorator]
def _copy_bytes(typing: Any, target: Any, source: Any, length: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        cgutils.raw_memcpy(builder, builder.inttoptr(args[0], byte), builder.inttoptr(args[1], byte), args[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), emit


@intrinsic  # type: ignore[untyped-decorator]
def _word_at(typing: Any, address: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(builder.inttoptr(args[0], _I64.as_pointer()), align=1)

    return types.uint64(types.int64), emit


@intrinsic  # type: ignore[untyped-decorator]
def _fence(typing: Any) -> Any:
    """Stores past the cache are visible before anything that follows (the message that tells of them)."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), emit


_u64 = np.uint64
_START_ARRAY = np.array(_START, dtype=np.uint64)
_KEYS = np.array([_word(offset) for offset in range(len(_SECRET) - 7)], dtype=np.uint64)
_LOW, _32 = _u64(0xFFFFFFFF), _u64(32)


@numba.njit("void(uint64[::1], int64, int64)", nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _stripe(acc: Any, source: int, key: int) -> None:
    """One stripe outside a full block; `key` is its place in the secret."""
    for lane in range(8):
        data = _word_at(source + 8 * lane)
        keyed = data ^ _KEYS[key + 8 * lane]
        acc[lane ^ 1] += data
        acc[lane] += (keyed & _LOW) * (keyed >> _32)


@numba.njit("uint64(uint64, uint64)", nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _fold(a: Any, b: Any) -> Any:
    """The two halves of the 128-bit product, xored."""
    a_low, a_high, b_low, b_high = a & _LOW, a >> _32, b & _LOW, b >> _32
    low, high = a_low * b_low, a_high * b_high
    cross = (low >> _32) + ((a_high * b_low) & _LOW) + a_low * b_high
    high += ((a_high * b_low) >> _32) + (cross >> _32)
    return ((cross << _32) | (low & _LOW)) ^ high


@numba.njit("uint64(uint64[::1], int64, int64)", nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _finish(acc: Any, source: int, length: int) -> Any:
    """What follows the full blocks: the rest of the stripes, the last 64 bytes, the merge."""
    done = (length - 1) // _BLOCK * _BLOCK
    for number in range((length - 1 - done) // _STRIPE):
        _stripe(acc, source + done + number * _STRIPE, number * 8)
    _stripe(acc, source + length - _STRIPE, _LAST_STRIPE_KEY)
    result = _u64(length) * _u64(_P64_1)
    for pair in range(4):
        key = _MERGE_KEY + 16 * pair
        result += _fold(acc[2 * pair] ^ _KEYS[key], acc[2 * pair + 1] ^ _KEYS[key + 8])
    result ^= result >> _u64(37)
    result *= _u64(0x165667919E3779F9)
    return result ^ (result >> _32)


@numba.njit("int64(int64, int64[:,::1], int64, int64)", nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _ahead(source: int, pieces: Any, index: int, block: int) -> Any:
    """The block to fetch while this one is worked on: further on in this piece, then the start of the next one."""
    place = (block + _LOOKAHEAD) * _BLOCK
    if place < pieces[index, 2] or index + 1 == pieces.shape[0]:
        return source + pieces[index, 0] + place
    return source + pieces[index + 1, 0] + place - pieces[index, 2]


@numba.njit("void(int64, int64, int64[:,::1], uint64[::1])", nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _copy_and_digest(target: int, source: int, pieces: Any, digests: Any) -> None:
    acc = np.empty(8, np.uint64)
    at = acc.ctypes.data
    for index in range(pieces.shape[0]):
        read, write, length = source + pieces[index, 0], target + pieces[index, 1], pieces[index, 2]
        acc[:] = _START_ARRAY
        blocks = (length - 1) // _BLOCK
        if write % 32:
            _copy_bytes(write, read, length)
            for block in range(blocks):
                _read_block(at, read + block * _BLOCK, _ahead(source, pieces, index, block))
        else:
            for block in range(blocks):
                _copy_block(at, read + block * _BLOCK, write + block * _BLOCK, _ahead(source, pieces, index, block))
            _copy_bytes(write + blocks * _BLOCK, read + blocks * _BLOCK, length - blocks * _BLOCK)
        digests[index] = _finish(acc, read, length)
    _fence()


@numba.njit("void(int64, int64[:,::1], uint64[::1])", nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _digest(source: int, pieces: Any, digests: Any) -> None:
    acc = np.empty(8, np.uint64)
    at = acc.ctypes.data
    for index in range(pieces.shape[0]):
        read, length = source + pieces[index, 0], pieces[index, 2]
        acc[:] = _START_ARRAY
        for block in range((length - 1) // _BLOCK):
            _read_block(at, read + block * _BLOCK, _ahead(source, pieces, index, block))
        digests[index] = _finish(acc, read, length)


@numba.njit("void(int64, int64, int64[:,::1])", nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _copy(target: int, source: int, pieces: Any) -> None:
    for index in range(pieces.shape[0]):
        _copy_bytes(target + pieces[index, 1], source + pieces[index, 0], pieces[index, 2])
    _fence()


def as_pieces(pieces: Sequence[tuple[int, int, int]] | Pieces) -> Pieces:
    return np.ascontiguousarray(pieces, dtype=np.int64).reshape(-1, 3)


def copy(target: int, source: int, pieces: Pieces) -> Digests:
    """Copy every piece from `source` + its local offset to `target` + its remote offset (addresses in this process,
    bounds checked by the caller). Returns the XXH3-64 of each piece."""
    digests = np.empty(len(pieces), np.uint64)
    if len(pieces) and pieces[:, 2].min() > SHORT:
        _copy_and_digest(target, source, pieces, digests)
        return digests
    _copy(target, source, pieces)
    return digest(source, pieces)


def digest(source: int, pieces: Pieces) -> Digests:
    """The XXH3-64 of each piece at `source` + its local offset."""
    digests = np.empty(len(pieces), np.uint64)
    if len(pieces) and pieces[:, 2].min() > SHORT:
        _digest(source, pieces, digests)
    else:
        for index, (offset, _, length) in enumerate(pieces.tolist()):
            digests[index] = xxhash.xxh3_64_intdigest(ctypes.string_at(source + offset, length))
    return digests
