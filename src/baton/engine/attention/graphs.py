"""Decode steps as CUDA graphs: the hundreds of launches of a step become one.

A graph is captured per batch size (powers of two, then steps of 16) when that size first comes, with buffers of its
own. A smaller batch is padded with rows that write to the pool's spare page and see nothing but it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from baton.engine.attention.base import Step
from baton.engine.attention.cuda import CudaAttention, CudaStep
from baton.engine.model_runner import Forward

LARGEST = 256
"""Rows; a larger batch is computed without a graph (launches no longer matter there)."""


@dataclass(slots=True)
class Captured:
    graph: torch.cuda.CUDAGraph
    tokens: Tensor
    positions: Tensor
    step: CudaStep
    logits: Tensor


@dataclass(slots=True)
class GraphForward:
    """Replays decode steps; hands everything else to `eager`. `spare_page`: no sequence ever owns it."""

    eager: Forward
    attention: CudaAttention
    most_pages: int
    spare_page: int
    _captured: dict[int, Captured] = field(default_factory=dict)

    def __call__(self, tokens: Tensor, positions: Tensor, step: Step, keep: Tensor) -> Tensor:
        rows = len(tokens)
        replayable = isinstance(step, CudaStep) and step.only_decodes and len(keep) == rows <= LARGEST
        if not replayable:
            return self.eager(tokens, positions, step, keep)
        assert isinstance(step, CudaStep)
        size = bucket(rows)
        captured = self._captured.get(size)
        if captured is None:
            captured = self._captured[size] = self._capture(size)
        captured.tokens[:rows].copy_(tokens)
        captured.positions[:rows].copy_(positions)
        captured.step.slots.fill_(self.spare_page * self.attention.pool.layout.page_size)
        captured.step.slots[:rows].copy_(step.slots)
        captured.step.pages.fill_(self.spare_page)
        captured.step.pages[:rows, : step.pages.shape[1]].copy_(step.pages)
        captured.step.decodes[:, 2].zero_()
        captured.step.decodes[:rows, 2].copy_(step.decodes[:, 2])
        captured.graph.replay()
        return captured.logits[:rows][keep]

    def _capture(self, size: int) -> Captured:
        device = self.attention.pool.pages.device
        tokens, positions = torch.zeros(2, size, dtype=torch.int64, device=device)
        step = self._idle_step(size, device)
        keep = torch.arange(size, device=device)
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):  # once before, so that every kernel is compiled and every workspace there
            self.eager(tokens, positions, step, keep)
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self.eager(tokens, positions, step, keep)
        return Captured(graph, tokens, positions, step, logits)

    def _idle_step(self, size: int, device: torch.device) -> CudaStep:
        """`size` rows, each the first token of a sequence on the spare page."""
        numbers = torch.arange(size, dtype=torch.int32, device=device)
        zeros, ones = torch.zeros_like(numbers), torch.ones_like(numbers)
        return CudaStep(
            self.attention,
            zeros + self.spare_page * self.attention.pool.layout.page_size,
            torch.full((size, self.most_pages), self.spare_page, dtype=torch.int32, device=device),
            torch.stack([numbers, numbers, zeros, ones], 1),
            torch.empty((0, 4), dtype=torch.int32, device=device),
            size,
        )


def bucket(rows: int) -> int:
    """The captured size that serves `rows`: 1, 2, 4, 8, 16, 32, 48, ..."""
    return 1 << (rows - 1).bit_length() if rows <= 16 else -(-rows // 16) * 16
