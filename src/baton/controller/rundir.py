"""The run directory: sockets and logs of one stack, and who removes them.

A directory belongs to the process that holds the lock in it. The kernel drops the lock with the process, however it
ends, so the next start can tell the directories of the dead from those of the living, and sweep them.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

from baton.base.errors import ConfigError

SOCKET_PATH_MAX = 100
"""Bytes a Unix socket's path may have on every system (104 on macOS, with its final zero)."""
FAILED_KEPT = 5
"""Directories of failed runs that are kept."""


class RunDirectory:
    """Made by `create`, ended by `remove` or `keep`."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def create(cls, base: Path | None = None) -> RunDirectory:
        """A fresh directory, after a sweep. Raises `ConfigError` if the base is not ours alone."""
        base = base or default_base()
        _own(base)
        gate = _lock(base / "lock", wait=True)  # nobody sweeps between our mkdir and our lock
        assert gate is not None
        try:
            sweep(base)
            path = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=base))
            lock = _lock(path / "lock", wait=True)
            assert lock is not None
        finally:
            os.close(gate)
        return cls(path, lock)

    def socket(self, name: str) -> Path:
        return self.path / f"{name}.sock"

    def log(self, name: str) -> Path:
        return self.path / f"{name}.log"

    def remove(self) -> None:
        """All is well: nothing stays. Idempotent."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._unlock()

    def keep(self) -> Path:
        """Something went wrong: the logs stay under a name that says so, for the last few failures."""
        kept = self.path.with_name(f"failed-{time.strftime('%Y%m%d-%H%M%S')}-{self.path.name}")
        for socket in self.path.glob("*.sock"):
            socket.unlink()
        self.path.rename(kept)
        self.path = kept
        self._unlock()
        return kept

    def _unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def default_base() -> Path:
    """One directory per user, with a path short enough for sockets."""
    base = Path(tempfile.gettempdir()) / f"baton-{os.getuid()}"
    return base if len(str(base)) < SOCKET_PATH_MAX // 2 else Path("/tmp") / base.name


def sweep(base: Path) -> None:
    """Remove what dead supervisors left, and all but the latest failures."""
    for path in base.iterdir():
        if path.is_dir() and not path.name.startswith("failed-"):
            lock = _lock(path / "lock", wait=False)
            if lock is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)
    for path in sorted(base.glob("failed-*"))[:-FAILED_KEPT]:
        shutil.rmtree(path, ignore_errors=True)


def tail(log: Path, lines: int = 20) -> list[str]:
    """The last lines of a log; none if there is no log."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 64 * 1024))
            return file.read().decode(errors="replace").splitlines()[-lines:]
    except FileNotFoundError:
        return []


def _own(base: Path) -> None:
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = base.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(f"{base} must belong to you and be closed to others (mode 700); remove it or set TMPDIR")


def _lock(path: Path, *, wait: bool) -> int | None:
    """An open file with an exclusive lock on it, to be closed by the caller; None: somebody else has it."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(file)
        return None
    return file
