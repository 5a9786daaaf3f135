"""The real `Runner`: a Transformers model over a paged KV cache.

batch ─▶ rows (decode steps first, answers in single ones) ─▶ model ─▶ logits of the rows that are asked for ─▶ sampler
      ─▶ batch order
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from baton.base.messages import TokenLogprob
from baton.engine.attention import Attention, Step, lay_out
from baton.engine.sequence import Sequence
from baton.engine.sockets import Sampled, Slice

NOTHING = Sampled()


class Sampling(Protocol):
    """What the runner needs of a sampler (`baton.engine.sampler.Sampler`)."""

    def sample(self, logits: Tensor, sequences: Seq[Sequence]) -> list[Sampled]: ...

    def prompt_logprobs(self, logits: Tensor, targets: Seq[int], top: int) -> tuple[TokenLogprob, ...]: ...

    def forget(self, sequence: Sequence) -> None: ...


class Forward(Protocol):
    """The model as a function: `EagerForward`, or one that replays CUDA graphs."""

    def __call__(self, tokens: Tensor, positions: Tensor, step: Step, keep: Tensor) -> Tensor:
        """tokens, positions [rows], keep [kept] row indices -> logits [kept, vocab], float32."""
        ...


class EagerForward:
    """Calls the model."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def __call__(self, tokens: Tensor, positions: Tensor, step: Step, keep: Tensor) -> Tensor:
        output = self.model(
            input_ids=tokens[None], position_ids=positions[None], use_cache=False, logits_to_keep=keep, step=step
        )
        logits: Tensor = output.logits[0]
        return logits.float()


class ModelRunner:
    def __init__(
        self, forward: Forward, attention: Attention, sampler: Sampling, page_size: int, device: torch.device
    ) -> None:
        self.forward = forward
        self.attention = attention
        self.sampler = sampler
        self.page_size = page_size
        self.device = device

    @torch.inference_mode()
    def run(self, batch: Seq[Slice]) -> list[Sampled]:
        """One forward step; results in the batch's order. Raises what the sampler raises."""
        pieces = [(index, part) for index, piece in enumerate(batch) for part in _parts(piece)]
        pieces.sort(key=lambda one: not one[1].is_decode)  # stable: decode steps first
        results = [NOTHING] * len(batch)
        for (index, _), result in zip(pieces, self._compute([part for _, part in pieces]), strict=True):
            results[index] = result if results[index] is NOTHING else _joined(results[index], result)
        return results

    def forget(self, sequence: Sequence) -> None:
        self.sampler.forget(sequence)

    def _compute(self, batch: Seq[Slice]) -> list[Sampled]:
        rows = lay_out(batch, self.page_size)
        tokens = torch.tensor([t for p in batch for t in p.sequence.tokens[p.start : p.start + p.count]])
        drawn = [int(first) + p.count - 1 for first, p in zip(rows.first_rows, batch, strict=True) if p.sample]
        told = [_told_rows(p, int(first)) for first, p in zip(rows.first_rows, batch, strict=True)]
        keep = drawn + [row for span in told for row in span]
        logits = self.forward(
            tokens.to(self.device),
            torch.from_numpy(rows.positions).to(self.device),
            self.attention.begin(rows),
            torch.tensor(keep, dtype=torch.int64, device=self.device),
        )
        return self._sample(batch, logits, len(drawn), told)

    def _sample(self, batch: Seq[Slice], logits: Tensor, drawn: int, told: Seq[range]) -> list[Sampled]:
        """`logits`: first the rows to draw from, then the rows whose prompt logprobs are wanted."""
        prompt_logits = torch.split(logits[drawn:], [len(span) for span in told])
        prompts = [self._prompt_logprobs(p, part) for p, part in zip(batch, prompt_logits, strict=True)]
        asked = [p.sequence for p in batch if p.sample]
        sampled = iter(self.sampler.sample(logits[:drawn], asked) if asked else [])
        results = [next(sampled) if p.sample else Sampled() for p in batch]
        return [replace(r, prompt_logprobs=logs) if logs else r for r, logs in zip(results, prompts, strict=True)]

    def _prompt_logprobs(self, piece: Slice, logits: Tensor) -> tuple[TokenLogprob, ...]:
        wanted = piece.sequence.sampling.prompt_logprobs
        if wanted is None or not len(logits):
            return ()
        targets = piece.sequence.tokens[_told_from(piece) + 1 :][: len(logits)]
        return self.sampler.prompt_logprobs(logits, targets, wanted)


def _joined(one: Sampled, other: Sampled) -> Sampled:
    """Of parts of a slice: one has the token, one may have logprobs of the prompt."""
    drawn = one if other.token is None else other
    return replace(drawn, prompt_logprobs=one.prompt_logprobs or other.prompt_logprobs)


def _parts(piece: Slice) -> Seq[Slice]:
    if piece.count == 1 or piece.start + piece.count <= piece.sequence.prompt_len:  # nearly always
        return (piece,)
    return piece.apart()


def _told_from(piece: Slice) -> int:
    """First position of the slice whose successor's logprob is wanted."""
    return max(piece.start, piece.sequence.sampling.prompt_logprobs_start)


def _told_rows(piece: Slice, first_row: int) -> range:
    """Rows whose logits give the logprob of the next prompt token, if that is asked for."""
    if piece.sequence.sampling.prompt_logprobs is None:
        return range(0)
    end = min(piece.start + piece.count, piece.sequence.prompt_len - 1)
    start = _told_from(piece)
    return range(first_row + start - piece.start, first_row + max(start, end) - piece.start)
