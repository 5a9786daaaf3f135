"""Where a peer may write now: tags and the ranges of our region they are good for."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from baton.transports.kernels import Pieces


class Windows:
    """`lock` is held by whoever moves bytes into a window, so that once `shut` returns none arrive any more."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._open: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def admit(self, tag: int, ranges: Sequence[tuple[int, int]]) -> None:
        table = np.array(sorted(ranges), dtype=np.int64).reshape(-1, 2)
        with self.lock:
            self._open[tag] = (table[:, 0], table[:, 0] + table[:, 1])

    def shut(self, tag: int) -> None:
        with self.lock:
            self._open.pop(tag, None)

    def shut_all(self) -> None:
        with self.lock:
            self._open.clear()

    def is_open(self, tag: int) -> bool:
        """Ask with the lock held."""
        return tag in self._open

    def covers(self, tag: int, pieces: Pieces) -> bool:
        """Does every piece's target lie in a range of the tag's window? Ask with the lock held."""
        window = self._open.get(tag)
        if window is None:
            return False
        if not len(pieces):
            return True
        starts, ends = window
        if not len(starts):
            return False
        inside = np.searchsorted(starts, pieces[:, 1], side="right") - 1
        return bool(inside.min() >= 0 and (pieces[:, 1] + pieces[:, 2] <= ends[inside]).all())
