"""What attention is asked to do in one step.

    rows       0   1   2 | 3 4 5 6 7 | 8 9 10        the tokens of all slices, flattened: decode steps come first
    slice      A   B   C |     D     |   E
    start     41   7  96 |     0     |  512          tokens of the sequence that are in its pages already
    count      1   1   1 |     5     |   3

Everything that depends on the batch alone is computed once per step, here, and not once per layer.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from baton.engine.sockets import Slice


@dataclass(frozen=True, slots=True)
class Spec:
    """What is fixed for one layer. `window`: how many tokens a query sees, itself included; 0: all before it.
    `softcap`: scores become softcap * tanh(score / softcap); 0: no such cap."""

    layer: int
    scale: float
    window: int = 0
    softcap: float = 0.0


@dataclass(frozen=True, slots=True)
class Rows:
    """Where the tokens of one step are; all arrays on the CPU."""

    positions: NDArray[np.int64]
    """[rows] position in its sequence."""
    pages: NDArray[np.int32]
    """[slices, most pages of a slice] page ids; what is beyond a slice's length is undefined."""
    starts: NDArray[np.int32]
    """[slices]"""
    counts: NDArray[np.int32]
    """[slices]"""
    first_rows: NDArray[np.int32]
    """[slices]"""
    decodes: int
    """The first `decodes` slices are decode steps: one row each."""

    @property
    def count(self) -> int:
        return len(self.positions)


@dataclass(frozen=True, slots=True)
class HeadTransform:
    """What happens to query and key heads before attention: RMS norm (where there are weights), then rotation."""

    cos: Tensor
    """[1, rows, head_dim], as `sin`: contiguous."""
    sin: Tensor
    query_norm: Tensor | None = None
    """[head_dim], as `key_norm`: both or none."""
    key_norm: Tensor | None = None
    eps: float = 0.0


class Step(Protocol):
    """One forward step. Handed down through the model, called once per layer."""

    def attend(self, spec: Spec, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Write the rows' KV into their pages, then let every row see its sequence up to itself.

        query [rows, heads, head_dim], key and value [rows, kv_heads, head_dim] -> [rows, heads, head_dim].
        """
        ...

    def attend_merged(self, spec: Spec, merged: Tensor, transform: HeadTransform) -> Tensor:
        """The same for query, key and value side by side, before their norm and rotation.

        merged [rows, (heads + 2 * kv_heads) * head_dim], may be overwritten -> [rows, heads * head_dim].
        """
        ...


class Attention(Protocol):
    """A kernel, bound to a KV pool."""

    def begin(self, rows: Rows) -> Step: ...


def lay_out(batch: Seq[Slice], page_size: int) -> Rows:
    """The rows of `batch`, whose decode steps must come first."""
    counts = np.array([piece.count for piece in batch], dtype=np.int32)
    starts = np.array([piece.start for piece in batch], dtype=np.int32)
    first_rows = np.cumsum(counts, dtype=np.int32) - counts
    used = -(-(starts + counts) // page_size)
    pages = np.zeros((len(batch), int(used.max())), dtype=np.int32)
    for index, piece in enumerate(batch):
        pages[index, : used[index]] = piece.sequence.pages[: used[index]]
    positions = np.arange(int(counts.sum()), dtype=np.int64) + np.repeat(starts - first_rows, counts)
    return Rows(positions, pages, starts, counts, first_rows, sum(piece.is_decode for piece in batch))


def slots_of(rows: Rows, page_size: int) -> NDArray[np.int64]:
    """[rows] page * page_size + offset of each row's token."""
    owners = np.repeat(np.arange(len(rows.counts)), rows.counts)
    pages = rows.pages[owners, rows.positions // page_size].astype(np.int64)
    return pages * page_size + rows.positions % page_size


def tiles_of(rows: Rows, span: int) -> NDArray[np.int64]:
    """[tiles, 4] slice, first row, first position, positions: every chunk in runs of `span`; those that see most come
    first, so that the threads end together."""
    tiles = [
        (index, rows.first_rows[index] + at, rows.starts[index] + at, min(span, rows.counts[index] - at))
        for index in range(rows.decodes, len(rows.counts))
        for at in range(0, int(rows.counts[index]), span)
    ]
    tiles.sort(key=lambda tile: -tile[2])
    return np.array(tiles, dtype=np.int64).reshape(-1, 4)
