"""`Unified`, the role without a hand-off, and `Committer`, what all roles do with a new token."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from baton.base.clock import Clock
from baton.base.errors import BatonError
from baton.base.messages import Finish, ToFront, TokenLogprob, Tokens
from baton.engine.scheduler import Scheduler
from baton.engine.sequence import Sequence
from baton.engine.sockets import HandoffLoad, Runner, Sampled, Slice


class Committer:
    """Accounts for computed slices and turns sampled tokens into messages; ends sequences that are complete."""

    def __init__(self, scheduler: Scheduler, runner: Runner, eos_token_ids: Seq[int], clock: Clock) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.eos_token_ids = frozenset(eos_token_ids)
        self.clock = clock

    def computed(self, piece: Slice, result: Sampled) -> None:
        """The slice's KV is in its pages."""
        sequence = piece.sequence
        held = len(sequence.pages) * self.scheduler.page_size
        assert held >= piece.start + piece.count, f"{sequence!r} left between step and commit"
        self.scheduler.advance(piece)
        sequence.prompt_logprobs += result.prompt_logprobs
        stamps = sequence.stamps
        if not stamps.prefilled and not stamps.delivered and sequence.computed_len >= sequence.given_len:
            stamps.prefilled = self.clock.now()

    def accept(self, sequence: Sequence, token: int, logprob: TokenLogprob | None) -> Tokens:
        """Append a token; if it is the last one, the sequence leaves the scheduler and its pages go back."""
        sequence.tokens.append(token)
        first = sequence.total_len == sequence.given_len + 1
        if first:
            sequence.stamps.first_token = self.clock.now()
        finish = self._finish(sequence, token)
        if finish is not None:
            self.leave(sequence)
        return Tokens(
            sequence.id,
            (token,),
            (logprob,) if logprob is not None else (),
            tuple(sequence.prompt_logprobs) if first else (),
            sequence.usage_cached_len,
            finish,
            sequence.usage() if finish is not None else None,
            sequence.stamps.freeze() if first or finish is not None else None,
        )

    def leave(self, sequence: Sequence) -> None:
        """Finished or aborted: nothing of it stays."""
        sequence.stamps.finished = self.clock.now()
        self.scheduler.remove(sequence)
        self.runner.forget(sequence)

    def commit(self, piece: Slice, result: Sampled) -> list[ToFront]:
        """Both: what an undivided engine does after a step."""
        self.computed(piece, result)
        if result.token is None:
            return []
        return [self.accept(piece.sequence, result.token, result.logprob)]

    def _finish(self, sequence: Sequence, token: int) -> Finish | None:
        finish = sequence.sampling.end(token, sequence.output_len, self.eos_token_ids)
        if finish is None and sequence.total_len >= self.scheduler.max_model_len:
            return Finish("length")
        return finish


class Unified:
    """Prefill and decode in one engine."""

    def __init__(self, scheduler: Scheduler, committer: Committer) -> None:
        self.scheduler = scheduler
        self.committer = committer
        self.handoffs = HandoffLoad()

    def submit(self, sequence: Sequence) -> None:
        self.scheduler.add(sequence)

    def poll(self) -> list[ToFront]:
        return []

    def commit(self, batch: Seq[Slice], results: Seq[Sampled]) -> list[ToFront]:
        return [m for piece, result in zip(batch, results, strict=True) for m in self.committer.commit(piece, result)]

    def abort(self, id: str, error: BatonError) -> bool:
        sequence = next((s for s in self.scheduler if s.id == id), None)
        if sequence is None:
            return False
        self.committer.leave(sequence)
        return True

    def next_deadline(self) -> float | None:
        return None

    def close(self) -> None:
        pass
