"""Shareable memory without a name."""

from __future__ import annotations

import mmap
import os
import sys
import tempfile

import numpy as np
import pytest

from baton.transports.region import Region


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def resident(address: int) -> bool:
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(address // mmap.PAGESIZE * 8)
        return bool(int.from_bytes(file.read(8), "little") >> 63)


def test_two_mappings_see_the_same_bytes() -> None:
    before = open_fds()
    owner = Region.create(10_000)
    neighbour = Region.attach(os.dup(owner.fd))
    owner.memory[9_999] = 7
    assert neighbour.memory[9_999] == 7
    assert neighbour.size == owner.size == len(owner.memory) == 10_000
    assert neighbour.address != owner.address
    neighbour.close()
    owner.close()
    owner.close()  # idempotent
    assert open_fds() == before


def test_every_page_is_there_from_the_start() -> None:
    region = Region.create(4 * mmap.PAGESIZE)
    assert all(resident(region.address + i * mmap.PAGESIZE) for i in range(4))
    region.close()


def test_it_is_zeroed_and_named_nowhere() -> None:
    names = set(os.listdir("/dev/shm")) | set(os.listdir(tempfile.gettempdir()))
    region = Region.create(1 << 16)
    assert not np.frombuffer(region.memory, np.uint8).any()
    left = set(os.listdir("/dev/shm")) | set(os.listdir(tempfile.gettempdir()))
    region.close()
    assert not [name for name in left - names if "baton" in name]


def test_an_array_keeps_the_memory_beyond_close() -> None:
    region = Region.create(64)
    array = np.frombuffer(region.memory, np.uint8)
    region.close()
    array[3] = 5
    assert array.sum() == 5


def test_no_empty_regions() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Region.create(0)


@pytest.mark.skipif(sys.platform != "linux", reason="seals are Linux's")
def test_memory_that_could_shrink_is_refused() -> None:
    before = open_fds()
    fd = os.memfd_create("unsealed")
    os.ftruncate(fd, 4096)
    with pytest.raises(ValueError, match="sealed"):
        Region.attach(fd)
    with tempfile.TemporaryFile() as file, pytest.raises(ValueError, match="sealed"):
        Region.attach(os.dup(file.fileno()))
    assert open_fds() == before
