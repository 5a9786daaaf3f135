"""Memory that another process of this host can map: what a KV pool is made of.

    owner      region = Region.create(size)     memfd, sealed against shrinking, every page there from the start
    neighbour  region = Region.attach(fd)       the same bytes, mapped a second time

A region never has a name: nothing is left behind when its processes end, however they end.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import sys
import tempfile

import numpy as np

if sys.platform == "linux":
    import fcntl

_POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE (Linux 5.14): make every page present and writable now, not at the first touch (8 times slower,
and in the middle of a request)."""
_OUT_OF_MEMORY = (errno.ENOMEM, errno.EFAULT)
_HEADROOM = "the KV pool does not fit into this machine's memory; ask for less with --kv-cache-gb or --kv-pages"


class Region:
    """`size` bytes at `address`, shareable through `fd`. One owner closes it.

    Slices of `memory` (NumPy arrays, torch tensors) keep the mapping alive beyond `close`; `fd` is gone at once.
    """

    def __init__(self, fd: int, size: int) -> None:
        """Use `create` or `attach`. Takes `fd` over."""
        self.fd = fd
        self.size = size
        self._map = mmap.mmap(fd, size)
        self.memory = memoryview(self._map)
        """Writable, `size` bytes."""
        self.address = np.frombuffer(self._map, np.uint8).ctypes.data
        """Where the first byte is in this process."""

    @classmethod
    def create(cls, size: int, *, populate: bool = True) -> Region:
        """New zeroed memory. Raises `MemoryError` if the machine does not have it, `ValueError` if `size` < 1."""
        if size < 1:
            raise ValueError(f"a region of {size} bytes; it must have at least one")
        fd = _anonymous_file(size)
        try:
            region = cls(fd, size)
        except BaseException:
            os.close(fd)
            raise
        if populate:
            region.populate()
        return region

    @classmethod
    def attach(cls, fd: int) -> Region:
        """Map another process's region; takes `fd` over. Raises `ValueError` if the file could shrink under us (we
        would die of SIGBUS) or is empty."""
        try:
            if not _cannot_shrink(fd):
                raise ValueError("the file offered as shared memory is not sealed against shrinking")
            return cls(fd, os.fstat(fd).st_size)
        except BaseException:
            os.close(fd)
            raise

    def populate(self) -> None:
        """Make every page present in this mapping. Raises `MemoryError`."""
        try:
            self._map.madvise(_POPULATE_WRITE)
        except OSError as error:
            if error.errno in _OUT_OF_MEMORY:
                raise MemoryError(_HEADROOM) from error
            touched = np.frombuffer(self._map, np.uint8)[:: mmap.PAGESIZE]  # an older kernel: touch them one by one
            touched |= 0

    def close(self) -> None:
        """Idempotent. The memory itself goes with its last user."""
        if self.fd < 0:
            return
        os.close(self.fd)
        self.fd = -1
        with contextlib.suppress(BufferError):  # arrays and tensors over it still live: the last one unmaps it
            self.memory.release()
            self._map.close()

    def __repr__(self) -> str:
        return f"<Region {self.size} bytes{' closed' if self.fd < 0 else ''}>"


def _anonymous_file(size: int) -> int:
    """A file descriptor of `size` zero bytes without a name."""
    if sys.platform == "linux":
        fd = os.memfd_create("baton-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return fd
    else:
        with tempfile.TemporaryFile() as file:  # unlinked at once; the duplicate keeps it
            file.truncate(size)
            return os.dup(file.fileno())


def _cannot_shrink(fd: int) -> bool:
    if sys.platform == "linux":
        try:
            return bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
        except OSError:  # not a memfd
            return False
    else:
        return True
