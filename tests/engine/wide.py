"""Runs tests of the kernels with the tiles of an AVX-512 machine, on any machine: LLVM makes narrow code of wide
vectors. Numba itself must see the machine as it is, so only our registers are told otherwise."""

import sys

import llvmlite.binding as llvm
import pytest

host = llvm.get_host_cpu_features
llvm.get_host_cpu_features = lambda: {"avx512f": True}
from baton.engine import registers  # noqa: E402

llvm.get_host_cpu_features = host
assert registers.LANES == 16
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
