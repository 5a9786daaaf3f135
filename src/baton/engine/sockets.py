"""The engine's sockets: what it needs of others, as small protocols. Fakes and null objects live beside them."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

from baton.base.errors import BatonError
from baton.base.messages import ToFront, TokenLogprob
from baton.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Slice:
    """Tokens [start, start + count) of a sequence, to be computed in one step.

    Its KV goes to the sequence's pages; everything before `start` is there already.
    """

    sequence: Sequence
    start: int
    count: int
    sample: bool
    """The slice reaches the last token: draw the next one."""

    @property
    def is_decode(self) -> bool:
        """One token of the answer. A last prompt token that stands alone is no decode step: kernels compute it as the
        rest of its prompt, so that the borders of chunks leave no trace in the last bits."""
        return self.count == 1 and self.start >= self.sequence.prompt_len

    def apart(self) -> list[Slice]:
        """The same, as what it has of the prompt and one decode step for each token of the answer. So these leave no
        trace of being computed again, or elsewhere: in one step, since none of them needs more of the one before than
        its keys and values, which a layer writes before it reads."""
        sequence, end = self.sequence, self.start + self.count
        border = max(self.start, min(end, sequence.prompt_len))
        pieces = [Slice(sequence, at, 1, self.sample and at + 1 == end) for at in range(border, end)]
        if border > self.start:
            pieces.insert(0, Slice(sequence, self.start, border - self.start, self.sample and border == end))
        return pieces


@dataclass(frozen=True, slots=True)
class Sampled:
    """What a step gives back for one slice."""

    token: int | None = None
    """The next token, if the slice asked for one."""
    logprob: TokenLogprob | None = None
    """Its logprob, if `sampling.logprobs` is set."""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """Of the *prompt tokens* at positions start + 1 .. start + count, that is of every prompt token whose predecessor
    was computed in this slice; only if `sampling.prompt_logprobs` is set."""


class Runner(Protocol):
    """Turns a batch into tokens: `ModelRunner`, or `EchoRunner` in tests and simulations."""

    def run(self, batch: Seq[Slice]) -> list[Sampled]:
        """One forward step over all slices, prefill and decode mixed; results in the batch's order."""
        ...

    def forget(self, sequence: Sequence) -> None:
        """The sequence is gone or moved: drop what was kept for it (grammar state, token counts). Idempotent."""
        ...


class Role(Protocol):
    """What an engine does with sequences: `Unified` (engine), `Prefill` and `Decode` (disagg).

    All calls come from the engine's one thread and return at once. A role returns messages, it calls nobody above.
    """

    def submit(self, sequence: Sequence) -> None:
        """Take a new sequence. Raises `BatonError` to refuse it (nothing is kept then)."""
        ...

    def poll(self) -> list[ToFront]:
        """Let hand-offs make progress: arrivals, losses, expired deadlines."""
        ...

    def commit(self, batch: Seq[Slice], results: Seq[Sampled]) -> list[ToFront]:
        """A step is done: account for it, hand tokens out, hand sequences over."""
        ...

    def abort(self, id: str, error: BatonError) -> bool:
        """Forget a sequence in whatever stage; False if it is not (any more) here. Idempotent. `error` is why: the
        caller tells the front, the role tells a peer."""
        ...

    @property
    def handoffs(self) -> HandoffLoad: ...

    def next_deadline(self) -> float | None:
        """When `poll` must be called even if nothing arrives (Clock time)."""
        ...

    def close(self) -> None: ...


class Preparation(Protocol):
    """What a sequence needs before it can be computed and what takes long, made beside the engine's thread: `Smith`."""

    def begin(self, sequence: Sequence) -> None:
        """Give it what it needs (`prepared`), or hold it (`held`): then `done` names it later. Returns at once. Who
        lets go of it earlier, because it has ended, unsets `held`."""
        ...

    def done(self) -> list[tuple[Sequence, BatonError | None]]:
        """What is ready since the last time, or why it cannot be made. `held` is still set."""
        ...

    def close(self) -> None: ...


class NothingToPrepare:
    """The null object."""

    def begin(self, sequence: Sequence) -> None:
        pass

    def done(self) -> list[tuple[Sequence, BatonError | None]]:
        return []

    def close(self) -> None:
        pass


@dataclass(slots=True)
class HandoffLoad:
    """Counts for `Load`."""

    open: int = 0
    """Between prefill and decode."""
    waiting: int = 0
    """Not begun: prompts that are computed elsewhere and have no pages here."""
    waiting_tokens: int = 0
    """Of these prompts."""
    quarantined_pages: int = 0
    done: int = 0
    failed: int = 0
    bytes: int = 0
    seconds: float = 0.0


class EchoRunner:
    """The fake model: answers with the prompt's tokens in turn, over and over; keeps no KV."""

    def run(self, batch: Seq[Slice]) -> list[Sampled]:
        return [self._next(piece) for piece in batch]

    def forget(self, sequence: Sequence) -> None:
        pass

    def _next(self, piece: Slice) -> Sampled:
        sequence = piece.sequence
        if not piece.sample:
            return Sampled()
        token = sequence.tokens[sequence.output_len % sequence.prompt_len]
        wanted = sequence.sampling.logprobs is not None
        return Sampled(token, TokenLogprob(0.0, token) if wanted else None)
