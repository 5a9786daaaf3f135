"""CPU kernels written in Python: compiled by numba, run by torch's own threads.

A kernel is a plain C function of one argument, a block of 64-bit words. Word 0 counts the tasks that were taken: every
thread that enters takes tasks until none is left, so the same function runs on one thread or on many, and a thread
that comes late costs nothing. The threads are those of torch's OpenMP: a second pool would fight with the first one
for the cores. Compiled code is cached on disk by numba.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from baton.engine import registers

FASTMATH = {"reassoc", "contract", "arcp", "afn", "nsz"}
"""All liberties but those about infinities and NaNs."""

LOG2E = numba.float32(1.4426950408889634)
LN2 = numba.float32(0.6931471805599453)
f32 = numba.float32
i32 = numba.int32


# --- what numba lacks -------------------------------------------------------------------------------------------


def _take(_typing: Any, words: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        counter = builder.bitcast(values[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", counter, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.voidptr), generate


def _pointer(_typing: Any, address: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return builder.inttoptr(values[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


def _as_float(_typing: Any, bits: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return builder.bitcast(values[0], ir.FloatType())

    return types.float32(types.int32), generate


def _prefetch(_typing: Any, address: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, values: Any) -> None:
        registers.prefetch(builder, values[0])

    return types.void(types.int64), generate


take = intrinsic(_take)
"""take(words) -> the next task's number; the caller stops when it is not below the number of tasks."""
pointer = intrinsic(_pointer)
"""pointer(address) -> voidptr, for `carray`."""
as_float = intrinsic(_as_float)
"""as_float(int32) -> the float32 with these bits."""

prefetch = intrinsic(_prefetch)
"""prefetch(address): start to load its cache line; harmless whatever the address is."""

inline = numba.njit(fastmath=FASTMATH, inline="always", error_model="numpy")
"""For functions that kernels call."""


def _floats(address: Any, count: Any) -> Any:
    return carray(pointer(address), (count,), types.float32)


def _ints(address: Any, count: Any) -> Any:
    return carray(pointer(address), (count,), types.int32)


def _exp(x: Any) -> Any:
    """e**x for x <= 0 (relative error below 2e-7); vectorises, unlike the C library's."""
    t = max(x, f32(-87.0)) * LOG2E
    n = i32(t - f32(0.5))  # to the nearest: t is not positive
    r = (t - f32(n)) * LN2
    p = f32(1.9875691500e-4)
    p = p * r + f32(1.3981999507e-3)
    p = p * r + f32(8.3334519073e-3)
    p = p * r + f32(4.1665795894e-2)
    p = p * r + f32(1.6666665459e-1)
    p = p * r + f32(5.0000001201e-1)
    p = p * r * r + r + f32(1.0)
    return p * as_float((n + i32(127)) << i32(23))


floats = inline(_floats)
"""floats(address, count) -> float32 array over foreign memory."""
ints = inline(_ints)
exp = inline(_exp)


def _tanh(x: Any) -> Any:
    e = exp(f32(-2.0) * abs(x))
    t = (f32(1.0) - e) / (f32(1.0) + e)
    return t if x >= f32(0.0) else -t


def _sigmoid(x: Any) -> Any:
    e = exp(-abs(x))
    return (f32(1.0) if x >= f32(0.0) else e) / (f32(1.0) + e)


tanh = inline(_tanh)
sigmoid = inline(_sigmoid)


# --- running them -----------------------------------------------------------------------------------------------


class Kernel:
    """A compiled kernel. `layout` is the struct format of its words after word 0: q for ints and addresses, d for
    floats (`decode` says how the body reads them)."""

    def __init__(self, body: Callable[[Any], None], layout: str) -> None:
        self.words = struct.Struct("=q" + layout)
        self._compiled = _compile(body)
        self.address: int = self._compiled.address
        self.call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self.address)


def _compile(body: Callable[[Any], None]) -> Any:
    signature = types.void(types.voidptr)
    try:
        return numba.cfunc(signature, fastmath=FASTMATH, error_model="numpy", cache=True)(body)
    except RuntimeError:  # nowhere to write the cache to: compile in every process
        return numba.cfunc(signature, fastmath=FASTMATH, error_model="numpy")(body)


class Team:
    """Runs kernels on `threads` threads; one per engine, used by its one thread."""

    def __init__(self, threads: int) -> None:
        self._words = ctypes.create_string_buffer(8 * 64)
        self._address = ctypes.addressof(self._words)
        self._fork = _openmp() if threads > 1 else None
        self.threads = threads if self._fork is not None else 1

    def run(self, kernel: Kernel, *values: float) -> None:
        """All tasks, on all threads."""
        kernel.words.pack_into(self._words, 0, 0, *values)
        if self._fork is None:
            kernel.call(self._address)
        else:
            self._fork(kernel.address, self._address, self.threads, 0)

    def run_alone(self, kernel: Kernel, *values: float) -> None:
        """All tasks, on this thread: for work that is smaller than waking the others."""
        kernel.words.pack_into(self._words, 0, 0, *values)
        kernel.call(self._address)


def _openmp() -> Callable[[int, int, int, int], None] | None:
    """`GOMP_parallel(function, data, threads, flags)` of the OpenMP library that torch has loaded, if it has one
    (GNU's; LLVM's and Intel's have it, too, under their own names)."""
    for name in ("libgomp.so.1", "libomp.so", "libiomp5.so"):
        try:
            library = ctypes.CDLL(name, mode=_NOLOAD)
        except OSError:
            continue
        fork = getattr(library, "GOMP_parallel", None)
        if fork is not None:
            fork.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
            fork.restype = None
            return fork  # type: ignore[no-any-return]
    return None


_NOLOAD = ctypes.DEFAULT_MODE | 0x4
"""RTLD_NOLOAD: only a library that is loaded already."""


def keep_freed_memory() -> None:
    """Tell the C library to keep large blocks that are freed: a step's temporaries come and go in milliseconds, and
    giving them back to the system means a page fault for every 4 KB each time. Without effect outside glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(_M_TRIM_THRESHOLD, 2**30)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
