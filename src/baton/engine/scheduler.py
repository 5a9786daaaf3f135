"""Who computes what in the next step: continuous batching, chunked prefill, preemption by recompute.

Sequences rank by priority (higher first), then by arrival (older first). Every step computes one token of each
decoding sequence and, in that order, chunks of prompts up to a budget of tokens. When pages run out, the last running
sequence in rank loses its pages and goes back to the queue; its tokens stay, so that recomputing them
continues the same answer. So whoever is first in rank moves on at every step, and nobody of equal priority starves.

    add ──▶ waiting ──(pages)──▶ running ──▶ finished: release
               ▲                    │
               └──── preempt ───────┤
                                    └──▶ detach: a role owns the pages from here on (hand-off);
                                         forfeit, resume: they were needed, it queues anew
    reserve (pages for a prompt that is computed elsewhere) ──▶ adopt ──▶ running

No I/O, no torch, no time: decisions only.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator

from baton.base.blockhash import chain, root
from baton.base.errors import BadRequest, Overloaded
from baton.engine.blocks import PagePool
from baton.engine.sequence import Sequence
from baton.engine.sockets import Slice


def rank(sequence: Sequence) -> tuple[int, int]:
    """What the queue and the running list are sorted by."""
    return -sequence.priority, sequence.arrival


class Scheduler:
    def __init__(
        self,
        pool: PagePool,
        *,
        page_size: int,
        max_running: int,
        max_waiting: int,
        chunk: int,
        max_model_len: int,
        prefix_caching: bool = True,
        namespace: str = "",
    ) -> None:
        self.pool = pool
        self.page_size = page_size
        self.max_running = max_running
        self.max_waiting = max_waiting
        self.chunk = chunk
        self.max_model_len = max_model_len
        self.prefix_caching = prefix_caching
        self.namespace = namespace
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.retractions = 0
        self._arrivals = 0
        self._flushes = 0

    # --- coming in -----------------------------------------------------------------------------------------

    def admit(self, sequence: Sequence) -> None:
        """Raise if the sequence can never run here (`BadRequest`)."""
        longest = min(self.max_model_len, self.pool.total * self.page_size)
        wanted = sequence.prompt_len + max(sequence.sampling.max_tokens, 1)
        if sequence.given_len >= longest:
            raise BadRequest(
                f"the prompt has {sequence.given_len} tokens; this model's context holds {longest}, output included",
                param="prompt",
            )
        if wanted > longest:
            raise BadRequest(
                f"prompt ({sequence.prompt_len}) and max_tokens ({sequence.sampling.max_tokens}) add up "
                f"to {wanted} tokens; this model's context holds {longest}",
                param="max_tokens",
            )

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence. Raises `BadRequest` if it can never fit, `Overloaded` if the queue is full."""
        self.admit(sequence)
        if len(self.waiting) >= self.max_waiting:
            raise Overloaded(f"{len(self.waiting)} requests are waiting already (max-queued-requests)")
        self._number(sequence)
        insort(self.waiting, sequence, key=rank)

    def reserve(self, sequence: Sequence) -> bool:
        """Pages for all that is given, for a prefill that happens elsewhere; the caller owns them (`release`).

        A known prefix is shared: `cached_len` and `computed_len` say how much (at most all but the last token).
        False if there are not enough pages now, with nothing taken; what was preempted here comes first.
        """
        self._number(sequence)
        if any(waiting.retractions for waiting in self.waiting):
            return False
        return self._take_pages(sequence, sequence.given_len)

    def adopt(self, sequence: Sequence) -> None:
        """A reserved sequence whose prompt has arrived (computed_len == given_len) and whose first token is
        appended: it decodes from the next step on."""
        assert sequence.computed_len == sequence.given_len < sequence.total_len
        self._number(sequence)
        self._publish(sequence)
        insort(self.running, sequence, key=rank)

    # --- one step ------------------------------------------------------------------------------------------

    def next_batch(self) -> list[Slice]:
        """Decide the next step, and take the pages for it. Empty: nothing to do, or everything waits for pages."""
        budget = self.chunk
        before = self.retractions
        batch: list[Slice] = []
        for sequence in list(self.running):
            if sequence in self.running:  # else preempted in this very loop, by one before it
                budget -= self._schedule(sequence, budget, batch)
        if self.retractions != before:  # pages are short: what was preempted waits for at least one step
            return [piece for piece in batch if piece.sequence in self.running]
        while budget > 0 and (head := self.head) is not None and len(self.running) < self.max_running:
            # What was preempted before comes back when all of its tokens fit: part of them would be lost again.
            if not self._take_pages(head, head.total_len if head.retractions else budget):
                break
            self.waiting.remove(head)
            insort(self.running, head, key=rank)
            budget -= self._schedule(head, budget, batch)
        return batch

    def advance(self, piece: Slice) -> None:
        """The slice is computed: its KV is in the pages, and full pages can be hit by others."""
        sequence = piece.sequence
        sequence.computed_len = piece.start + piece.count
        self._publish(sequence)

    # --- going out -----------------------------------------------------------------------------------------

    def detach(self, sequence: Sequence) -> None:
        """The sequence leaves the scheduler with its pages; the caller calls `release` when nobody needs them."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def release(self, sequence: Sequence) -> None:
        """The one line that gives a sequence's pages back. Idempotent."""
        pages, sequence.pages = sequence.pages, []
        self.pool.give_back(pages)

    def forfeit(self, sequence: Sequence) -> None:
        """The sequence loses its pages, and what was computed in them. Its tokens stay: `resume`, or whoever
        preempted it, has them computed again."""
        self.release(sequence)
        sequence.computed_len = sequence.cached_len = sequence.published = 0
        sequence.prompt_logprobs.clear()  # they are computed again, or were told with the first token
        sequence.retractions += 1
        self.retractions += 1

    def resume(self, sequence: Sequence) -> None:
        """Detached, and then forfeited: it queues anew, at its old rank."""
        insort(self.waiting, sequence, key=rank)

    def remove(self, sequence: Sequence) -> None:
        """Finished or aborted: out of the scheduler, pages back."""
        self.detach(sequence)
        self.release(sequence)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.waiting

    @property
    def head(self) -> Sequence | None:
        """The next to be admitted: the first that is not held."""
        return next((sequence for sequence in self.waiting if not sequence.held), None)

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens that are not computed yet."""
        return sum(s.pending_len for s in self if s.pending_len > 1)

    def flush(self) -> int:
        """Empty the prefix index, and keep out of it what is computed on pages taken before now (KV of old weights).
        Returns how many prefixes were dropped."""
        self._flushes += 1
        return self.pool.forget_all()

    def check(self, elsewhere: int = 0) -> None:
        """The audit: all pages are accounted for, exactly if roles hold none (`elsewhere` says how many sequences or
        pages they have). Cheap enough to run whenever the engine falls idle."""
        self.pool.check()
        assert not any(sequence.pages for sequence in self.waiting), "a waiting sequence has pages"
        if not elsewhere:
            held = sum(len(sequence.pages) for sequence in self.running)
            assert self.pool.users == held, f"{held} page uses in running sequences, but {self.pool!r}"

    # --- inside --------------------------------------------------------------------------------------------

    def _number(self, sequence: Sequence) -> None:
        if not sequence.arrival:
            self._arrivals += 1
            sequence.arrival = self._arrivals

    def _schedule(self, sequence: Sequence, budget: int, batch: list[Slice]) -> int:
        """Append the sequence's next slice to the batch, if there is budget for one. Returns what it costs: decode
        steps are free and need none, so that a full batch never starves prefill, nor a long prompt the decodes."""
        decodes = sequence.output_len > 0 and sequence.pending_len == 1
        count = 1 if decodes else min(budget, sequence.pending_len)
        if not count or not self._grow(sequence, sequence.computed_len + count):
            return 0
        end = sequence.computed_len + count
        batch.append(Slice(sequence, sequence.computed_len, count, end == sequence.total_len))
        return 0 if decodes else count

    def _grow(self, sequence: Sequence, length: int) -> bool:
        """Pages for the first `length` tokens; preempts those after it in rank, in the end itself (then False)."""
        missing = -(-length // self.page_size) - len(sequence.pages)
        while missing > self.pool.free:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        if missing > 0:
            sequence.pages += self.pool.take(missing)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.forfeit(sequence)
        insort(self.waiting, sequence, key=rank)

    def _match(self, sequence: Sequence) -> list[int]:
        """Pages of the longest known prefix; the last token is always computed, to have its logits."""
        if not self.prefix_caching or sequence.sampling.prompt_logprobs is not None:
            return []
        self._hash(sequence, (sequence.total_len - 1) // self.page_size)
        return self.pool.match(sequence.hashes[: (sequence.total_len - 1) // self.page_size])

    def _take_pages(self, sequence: Sequence, budget: int) -> bool:
        """Start a sequence: share its known prefix, take new pages for up to `budget` tokens more. All or nothing.

        One page for each running sequence stays free: admitted with the last pages, this one would lose them at once.
        """
        hit = self._match(sequence)
        cached_len = len(hit) * self.page_size
        missing = -(-min(sequence.total_len, cached_len + budget) // self.page_size) - len(hit)
        if missing + len(self.running) > self.pool.free - self.pool.idle(hit):
            return False
        self.pool.share(hit)
        sequence.pages = hit + self.pool.take(missing)
        sequence.published = len(hit)
        sequence.flushes = self._flushes
        sequence.cached_len = sequence.computed_len = cached_len
        if not sequence.retractions:
            sequence.usage_cached_len = min(cached_len, sequence.prompt_len)
        return True

    def _publish(self, sequence: Sequence) -> None:
        if not self.prefix_caching or sequence.flushes != self._flushes:
            return
        full = sequence.computed_len // self.page_size
        self._hash(sequence, full)
        for index in range(sequence.published, full):
            self.pool.publish(sequence.pages[index], sequence.hashes[index])
        sequence.published = max(sequence.published, full)

    def _hash(self, sequence: Sequence, count: int) -> None:
        """Make the hashes of the first `count` pages known (the tokens are there, computed or not)."""
        size = self.page_size
        while len(sequence.hashes) < count:
            index = len(sequence.hashes)
            parent = sequence.hashes[-1] if index else root(f"{self.namespace}\0{sequence.salt}")
            sequence.hashes.append(chain(parent, sequence.tokens[index * size : (index + 1) * size]))
