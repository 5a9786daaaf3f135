"""Which tokens a sequence has, and how often: what penalties need, kept up to date instead of counted anew."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from baton.engine.sequence import Sequence


class History:
    """The distinct tokens of a sequence and how often each occurs in its output (0: only in the prompt)."""

    def __init__(self, sequence: Sequence, vocab_size: int) -> None:
        self._sequence = sequence
        self._vocab_size = vocab_size
        self._seen = sequence.prompt_len
        prompt = np.unique(np.asarray(sequence.tokens[: sequence.prompt_len], dtype=np.int64))
        prompt = prompt[(prompt >= 0) & (prompt < vocab_size)]
        self._tokens = prompt
        self._counts = np.zeros(len(prompt), dtype=np.float32)
        self._size = len(prompt)
        self._place = {int(token): index for index, token in enumerate(prompt)}

    def __len__(self) -> int:
        return self._size

    @property
    def tokens(self) -> NDArray[np.int64]:
        return self._tokens[: self._size]

    @property
    def counts(self) -> NDArray[np.float32]:
        return self._counts[: self._size]

    def continues(self, sequence: Sequence) -> bool:
        """Is this the history of that very sequence, and of nothing it has lost since?"""
        return self._sequence is sequence and self._seen <= sequence.total_len

    def catch_up(self) -> None:
        """Count what was appended since."""
        sequence = self._sequence
        self._count(sequence.tokens[self._seen :])
        self._seen = sequence.total_len

    def _count(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            place = self._place.get(token)
            if place is None:
                place = self._append(token)
            self._counts[place] += 1

    def _append(self, token: int) -> int:
        if self._size == len(self._tokens):
            room = max(16, self._size)
            self._tokens = np.concatenate([self._tokens, np.zeros(room, dtype=np.int64)])
            self._counts = np.concatenate([self._counts, np.zeros(room, dtype=np.float32)])
        place = self._place[token] = self._size
        self._tokens[place] = token
        self._size += 1
        return place
