"""From logits to tokens.

What is done to a row of logits, in this order (vLLM's; SGLang's users get what they expect as well):

    1 logprobs       log_softmax of the model's own logits, before anything below: what is reported is the model's
                     opinion, not the filtered distribution
    2 grammar        tokens that the grammar does not allow are impossible
    3 min_tokens     end-of-sequence tokens and stop_token_ids are impossible until there are that many output tokens
                     (unless nothing else is left: a grammar that is complete wins)
    4 logit_bias     added
    5 penalties      repetition (prompt and output: positive logits divided, negative ones multiplied), then
                     frequency * count and presence (output only: subtracted)
    6 temperature    below 1e-5: the largest logit, the lowest token id among equals, and nothing below applies
    7 min_p          at least min_p times the probability of the most likely token
    8 top_k          the k most likely of those
    9 top_p          of those, renormalised, the smallest set of most likely tokens that has this much probability
    10 the draw      one uniform number, looked up in the cumulative distribution in the order of token ids

Steps 7 to 9 are thresholds: tokens exactly as likely as the last one that is in are in, too, so that no order among
equals matters. The number of step 10 depends on (seed, position of the new token in the sequence) alone. Hence a row's
token depends on nothing but its logits and its sequence's tokens: not on the batch, not on preemption, and not
on the worker. What is remembered of a sequence is derived from its tokens, and rebuilt when it is not there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import torch
from torch import Tensor

from baton.base.errors import BadRequest
from baton.base.messages import Sampling, TokenLogprob
from baton.engine.grammar import Constraints
from baton.engine.history import History
from baton.engine.sequence import Sequence
from baton.engine.sockets import Sampled

GREEDY_BELOW = 1e-5
"""Temperatures that are zero for all purposes (dividing by them overflows)."""

NUCLEUS_FIRST = 1024
NUCLEUS_NEXT = 8192
"""How many of the most likely tokens top_p looks at before it looks at all."""

BLOCK = 64
"""Tokens whose weights are added up before anything is looked up."""

PROMPT_ROWS = 64
"""Prompt positions whose logprobs are computed at once: bounds the temporary memory."""


class Sampler:
    """Draws the next token of each sequence; one per engine rank."""

    def __init__(self, vocab_size: int, eos_token_ids: Iterable[int], grammars: Constraints) -> None:
        self.vocab_size = vocab_size
        self.eos_token_ids = tuple(eos_token_ids)
        self.grammars = grammars
        grammars.bind(vocab_size, self.eos_token_ids)
        self._histories: dict[str, History] = {}

    def sample(self, logits: Tensor, sequences: Seq[Sequence]) -> list[Sampled]:
        """One token for each row of `logits` [rows, vocab], float32, which may be modified.

        Raises `BadRequest` whose `param` is the id of the sequence that cannot be served; nothing is drawn then.
        """
        samplings = [sequence.sampling for sequence in sequences]
        told = [row for row, sampling in enumerate(samplings) if sampling.logprobs is not None]
        raw = logits[told] if told else None  # indexing with a list copies
        self._constrain(logits, sequences)
        tokens = _choose(logits, sequences)
        if raw is None:
            return [Sampled(token) for token in tokens]
        tops = [samplings[row].logprobs or 0 for row in told]
        logprobs = dict(zip(told, token_logprobs(raw, [tokens[row] for row in told], tops), strict=True))
        return [Sampled(token, logprobs.get(row)) for row, token in enumerate(tokens)]

    def prompt_logprobs(self, logits: Tensor, targets: Seq[int], top: int) -> tuple[TokenLogprob, ...]:
        """Logprobs of the prompt tokens `targets`, where row i of `logits` [n, vocab] predicts targets[i]."""
        answers: list[TokenLogprob] = []
        for start in range(0, len(targets), PROMPT_ROWS):
            part = targets[start : start + PROMPT_ROWS]
            answers += token_logprobs(logits[start : start + len(part)], part, [top] * len(part))
        return tuple(answers)

    def forget(self, sequence: Sequence) -> None:
        """The sequence is gone or moved. Idempotent."""
        self._histories.pop(sequence.id, None)
        self.grammars.forget(sequence)

    # --- steps 2 to 5 --------------------------------------------------------------------------------------

    def _constrain(self, logits: Tensor, sequences: Seq[Sequence]) -> None:
        """Everything that changes logits whatever the temperature. A batch that asks for nothing costs nothing."""
        rows = list(enumerate(sequences))
        for row, sequence in rows:
            if sequence.sampling.grammar is not None:
                self._apply_grammar(logits[row], sequence)
        early = [(row, s) for row, s in rows if s.output_len < s.sampling.min_tokens]
        for row, sequence in early:
            self._ban_ends(logits[row], sequence)
        biased = [(row, s) for row, s in rows if s.sampling.logit_bias]
        if biased:
            self._apply_bias(logits, biased)
        penalised = [(row, s) for row, s in rows if _penalised(s.sampling)]
        if penalised:
            self._apply_penalties(logits, penalised)

    def _apply_grammar(self, row: Tensor, sequence: Sequence) -> None:
        allowed = self.grammars.allowed(sequence)
        row += torch.from_numpy(np.where(allowed, np.float32(0), np.float32(-math.inf))).to(row.device)

    def _ban_ends(self, row: Tensor, sequence: Sequence) -> None:
        ends = {*self.eos_token_ids, *sequence.sampling.stop_token_ids}
        index = _tensor([token for token in ends if 0 <= token < self.vocab_size], torch.int64, row.device)
        before = row[index]
        row[index] = -math.inf
        if row.amax() == -math.inf:
            row[index] = before

    def _apply_bias(self, logits: Tensor, biased: Seq[tuple[int, Sequence]]) -> None:
        rows: list[int] = []
        tokens: list[int] = []
        values: list[float] = []
        for row, sequence in biased:
            for token, value in sequence.sampling.logit_bias:
                if not 0 <= token < self.vocab_size:
                    raise BadRequest(
                        f"logit_bias names token {token}; this model's are 0 to {self.vocab_size - 1}",
                        param=sequence.id,
                    )
                rows.append(row)
                tokens.append(token)
                values.append(value)
        device = logits.device
        index = (_tensor(rows, torch.int64, device), _tensor(tokens, torch.int64, device))
        logits.index_put_(index, _tensor(values, logits.dtype, device), accumulate=True)

    def _apply_penalties(self, logits: Tensor, penalised: Seq[tuple[int, Sequence]]) -> None:
        """One gather and one scatter over the distinct tokens of all rows that have penalties."""
        histories = [self._history(sequence) for _, sequence in penalised]
        sizes = [len(history) for history in histories]
        if not sum(sizes):
            return
        device = logits.device
        rows = _tensor(np.repeat([row for row, _ in penalised], sizes), torch.int64, device)
        tokens = _tensor(np.concatenate([history.tokens for history in histories]), torch.int64, device)
        counts = _tensor(np.concatenate([history.counts for history in histories]), logits.dtype, device)
        samplings = [sequence.sampling for _, sequence in penalised]
        repetition = _tensor(np.repeat([s.repetition_penalty for s in samplings], sizes), logits.dtype, device)
        frequency = _tensor(np.repeat([s.frequency_penalty for s in samplings], sizes), logits.dtype, device)
        presence = _tensor(np.repeat([s.presence_penalty for s in samplings], sizes), logits.dtype, device)
        values = logits[rows, tokens]
        values = torch.where(values > 0, values / repetition, values * repetition)
        values -= frequency * counts + presence * (counts > 0)
        logits[rows, tokens] = values

    def _history(self, sequence: Sequence) -> History:
        history = self._histories.get(sequence.id)
        if history is None or not history.continues(sequence):
            history = self._histories[sequence.id] = History(sequence, self.vocab_size)
        history.catch_up()
        return history


# --- steps 6 to 10 -------------------------------------------------------------------------------------------


def _choose(logits: Tensor, sequences: Seq[Sequence]) -> list[int]:
    drawn = [row for row, s in enumerate(sequences) if s.sampling.temperature >= GREEDY_BELOW]
    if not drawn:
        return _argmax(logits)
    if len(drawn) == len(sequences):
        return _draw(logits, sequences)
    greedy = [row for row, s in enumerate(sequences) if s.sampling.temperature < GREEDY_BELOW]
    tokens = dict(zip(greedy, _argmax(logits[greedy]), strict=True))
    tokens.update(zip(drawn, _draw(logits[drawn], [sequences[row] for row in drawn]), strict=True))
    return [tokens[row] for row in range(len(sequences))]


def _argmax(logits: Tensor) -> list[int]:
    """The first of the largest logits of each row."""
    if logits.device.type == "cpu":  # numpy's is vectorised: 12 times as fast as torch's at 49k
        return [int(token) for token in logits.numpy().argmax(-1)]
    return [int(token) for token in logits.argmax(-1).tolist()]


def _draw(logits: Tensor, sequences: Seq[Sequence]) -> list[int]:
    """Steps 6 to 10 for rows with a temperature; `logits` is modified."""
    device = logits.device
    samplings = [sequence.sampling for sequence in sequences]
    logits /= _tensor([s.temperature for s in samplings], logits.dtype, device)[:, None]
    logits -= logits.amax(-1, keepdim=True)  # the most likely token is at 0
    filtered = [row for row, s in enumerate(samplings) if _filtered(s, logits.shape[-1])]
    if len(filtered) == len(samplings):
        weights = _filter(logits, samplings)
    else:
        kept = _filter(logits[filtered], [samplings[row] for row in filtered]) if filtered else None
        weights = logits.exp_()
        if kept is not None:
            weights[filtered] = kept
    numbers = [uniform(s.sampling.seed, s.total_len) for s in sequences]
    return invert_cumulative(weights, _tensor(numbers, torch.float64, device)[:, None])


def _filtered(sampling: Sampling, vocab_size: int) -> bool:
    return sampling.min_p > 0 or sampling.top_p < 1 or 0 < sampling.top_k < vocab_size


def _filter(scaled: Tensor, samplings: Seq[Sampling]) -> Tensor:
    """Weights [rows, vocab] of the tokens that min_p, top_k and top_p leave in, zero for the others. `scaled` has its
    largest values at 0, and is used up."""
    device, vocab = scaled.device, scaled.shape[-1]
    floors = _tensor([[math.log(s.min_p) if s.min_p > 0 else -math.inf] for s in samplings], scaled.dtype, device)
    ks = [s.top_k if 0 < s.top_k < vocab else vocab for s in samplings]
    nucleus = any(s.top_p < 1 for s in samplings)
    ordered = _ascending(scaled) if nucleus or min(ks) < vocab else scaled
    if min(ks) < vocab:
        floors = torch.maximum(floors, ordered.gather(-1, vocab - _tensor(ks, torch.int64, device)[:, None]))
    weights = scaled.exp()
    if nucleus:
        floors = torch.maximum(floors, _nucleus(ordered, floors, weights.sum(-1, keepdim=True).double(), samplings))
    weights *= scaled.ge_(floors)  # in place: ones and zeros as floats, three times as fast to multiply with
    return weights


def _nucleus(ordered: Tensor, floors: Tensor, everything: Tensor, samplings: Seq[Sampling]) -> Tensor:
    """The lowest value [rows, 1] that top_p leaves in. Looks at the largest values first: mostly they suffice.

    `everything` [rows, 1] is the weight of all tokens, those below `floors` included.
    """
    vocab = ordered.shape[-1]
    top_p = _tensor([[s.top_p] for s in samplings], torch.float64, ordered.device)
    lowest = torch.full_like(floors, -math.inf)
    rows = [row for row, s in enumerate(samplings) if s.top_p < 1]
    for width in (min(NUCLEUS_FIRST, vocab), min(NUCLEUS_NEXT, vocab), vocab):
        likely, floor = ordered[rows, -width:].flip(-1), floors[rows]
        cumulative = ((likely >= floor) * likely.exp()).cumsum(-1, dtype=torch.float64)
        in_view = (likely[:, -1:] < floor) | (width == vocab)  # all that is above the floor
        wanted = top_p[rows] * torch.where(in_view, cumulative[:, -1:], everything[rows])
        index = torch.searchsorted(cumulative, wanted).clamp_(max=width - 1)
        lowest[rows] = likely.gather(-1, index)
        enough = in_view | ((floor == -math.inf) & (cumulative[:, -1:] >= wanted))
        rows = [row for row, found in zip(rows, enough[:, 0].tolist(), strict=True) if not found]
        if not rows:
            break
    return lowest


def _ascending(values: Tensor) -> Tensor:
    """Rows sorted, the smallest first."""
    if values.device.type == "cpu":  # numpy's vectorised sort: 50 times as fast as torch's, faster than its topk
        return torch.from_numpy(np.sort(values.numpy(), axis=-1))
    return values.sort(-1).values


def invert_cumulative(weights: Tensor, numbers: Tensor) -> list[int]:
    """The token at which the cumulative weight of each row [rows, vocab] passes `numbers` [rows, 1] in [0, 1).

    A token without weight is never it. First the block of tokens, then the token in it: one pass in single precision,
    the rest in double, so that no border between two tokens is moved visibly.
    """
    rows, vocab = weights.shape
    padded = weights if vocab % BLOCK == 0 else torch.nn.functional.pad(weights, (0, -vocab % BLOCK))
    blocks = padded.view(rows, -1, BLOCK)
    cumulative = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
    target = numbers * cumulative[:, -1:]
    block = torch.searchsorted(cumulative, target, right=True).clamp_(max=blocks.shape[1] - 1)
    before = torch.where(block > 0, cumulative.gather(-1, (block - 1).clamp_(min=0)), 0.0)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK))[:, 0].cumsum(-1, dtype=torch.float64)
    last = torch.searchsorted(inside, inside[:, -1:].contiguous())  # the last one with weight
    index = torch.minimum(torch.searchsorted(inside, target - before, right=True), last)
    return [int(token) for token in (block * BLOCK + index).clamp_(max=vocab - 1)[:, 0].tolist()]


# --- the random numbers --------------------------------------------------------------------------------------

_MASK = 2**64 - 1


def _mix(value: int) -> int:
    """splitmix64: neighbouring integers become unrelated ones."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 52 random bits, the same for the same (seed, position) everywhere and for ever.

    52 bits, not 53: times any total it stays below that total in double precision.
    """
    return (_mix(_mix(seed & _MASK) ^ _mix(~position & _MASK)) >> 12) * 2.0**-52


# --- logprobs ------------------------------------------------------------------------------------------------


def token_logprobs(logits: Tensor, tokens: Seq[int], tops: Seq[int]) -> list[TokenLogprob]:
    """log_softmax of each row at its token, and the row's `tops` most likely tokens (equals by token id)."""
    normaliser = logits.logsumexp(-1, keepdim=True)
    index = _tensor(tokens, torch.int64, logits.device)[:, None]
    chosen = (logits.gather(-1, index) - normaliser)[:, 0].tolist()
    most = min(max(tops), logits.shape[-1])
    if most == 0:
        return [TokenLogprob(value, token) for value, token in zip(chosen, tokens, strict=True)]
    values, ids = logits.topk(most, dim=-1)
    rows = zip(chosen, tokens, tops, (values - normaliser).tolist(), ids.tolist(), strict=True)
    return [TokenLogprob(value, token, _top(likely, who, top)) for value, token, top, likely, who in rows]


def _top(values: Seq[float], tokens: Seq[int], count: int) -> tuple[tuple[float, int], ...]:
    pairs = sorted(zip(values, tokens, strict=True), key=lambda pair: (-pair[0], pair[1]))
    return tuple(pairs[:count])


def _penalised(sampling: Sampling) -> bool:
    return bool(sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1.0)


def _tensor(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.as_tensor(values, dtype=dtype).to(device, non_blocking=True)
