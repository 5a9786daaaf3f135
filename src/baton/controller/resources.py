"""Cores, GPUs and ports of this machine: who gets what."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from baton.base.errors import ConfigError

FIRST_DYNAMIC = 20000
"""Where the search for any port begins: above what services use, below what the kernel gives to clients."""


def available_cores() -> list[int]:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def assign_cores(workers: int, available: Sequence[int]) -> list[tuple[int, ...]]:
    """Equal, adjacent shares of the cores, one per engine; with more engines than cores they take turns.

    >>> assign_cores(2, [0, 1, 2, 3, 4])
    [(0, 1), (2, 3)]
    """
    share = len(available) // workers
    if share == 0:
        return [(available[i % len(available)],) for i in range(workers)]
    return [tuple(available[i * share : (i + 1) * share]) for i in range(workers)]


def visible_gpus() -> int:
    """NVIDIA GPUs that CUDA would see, without asking CUDA."""
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is not None:
        return len([name for name in wanted.split(",") if name.strip() not in ("", "-1")])
    devices = Path("/dev")
    return sum(1 for path in devices.iterdir() if re.fullmatch(r"nvidia\d+", path.name)) if devices.is_dir() else 0


def is_free(host: str, port: int) -> bool:
    """Could somebody listen there now?"""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: TIME_WAIT does not matter
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def require_free(host: str, port: int, option: str = "--port") -> int:
    """`port`, or a `ConfigError` if it is taken. 0: one that is free now."""
    if port == 0:
        return next(free_ports(host, FIRST_DYNAMIC))
    if not is_free(host, port):
        raise ConfigError(f"port {port} on {host} is taken by another process; choose another with {option}")
    return port


def free_ports(host: str, start: int, taken: Iterable[int] = ()) -> Iterator[int]:
    """Free ports from `start` upwards, each given once. Raises `ConfigError` when there is none left."""
    not_these = set(taken)
    for port in range(start, 65536):
        if port not in not_these and is_free(host, port):
            yield port
    raise ConfigError(f"no free port on {host} from {start} upwards")
