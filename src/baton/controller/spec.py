"""What is to run: frozen descriptions of processes. Everything here can be pickled and compared.

A process names its target by an import string, so that the controller never imports what it launches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class HttpCheck:
    """Ready when a GET answers 200."""

    url: str
    token: str = field(default="", repr=False)
    """Bearer token to send; empty: none."""


@dataclass(frozen=True, slots=True)
class PathCheck:
    """Ready when the path (a Unix socket) exists."""

    path: Path


Check = HttpCheck | PathCheck


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """When a process that died is started again. Times in seconds."""

    first_delay: float = 0.2
    """Doubled with each death in a row."""
    max_delay: float = 10.0
    healthy_after: float = 30.0
    """Ready for so long, a process is healthy: its next death counts as the first."""
    attempts: int = 3
    """Deaths before it was ever ready that make the whole stack give up."""

    def delay(self, deaths: int) -> float:
        """Back-off before the next start, after `deaths` (>= 1) deaths in a row."""
        return min(self.first_delay * 2.0 ** min(deaths - 1, 30), self.max_delay)


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """One process, to be kept running."""

    name: str
    """Unique in its stack; also the name of its log."""
    target: str
    """`package.module:function`, called with `kwargs`."""
    log: Path
    ready: Check
    kwargs: Mapping[str, object] = field(default_factory=dict)
    heavy: bool = False
    """Needs the heavy libraries: forked from a process that has imported them, instead of started afresh."""
    after: tuple[str, ...] = ()
    """Processes that must be ready before this one starts; if one of them dies, this one restarts as well."""
    cores: tuple[int, ...] = ()
    """CPU cores it is pinned to; empty: any."""
    env: Mapping[str, str] = field(default_factory=dict)
    restart: RestartPolicy = RestartPolicy()
    startup_timeout: float = 300.0
    stop_rank: int = 0
    """Stacks stop from rank 0 upwards; a rank begins when the one before is gone."""
    stop_timeout: float = 10.0
    """Seconds between SIGTERM and SIGKILL."""
