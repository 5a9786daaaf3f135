"""A runner with a memory: it writes into pages what belongs there, and finds out when something else is in them."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from baton.base.blockhash import BlockHash, chain, root
from baton.engine.scheduler import Scheduler
from baton.engine.sequence import Sequence
from baton.engine.sockets import EchoRunner, Sampled, Slice


class MemoryRunner(EchoRunner):
    """Echoes, and keeps for each slot of each page a digest of all tokens up to there and of the weights' version.

    Before a slice is computed, everything that it attends to must be in its pages. Checks what a step may ask.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.memory: dict[int, BlockHash] = {}
        self.weights = "1"
        self.steps = 0
        self.forgotten: list[str] = []

    def run(self, batch: Seq[Slice]) -> list[Sampled]:
        self.steps += 1
        self._check_batch(batch)
        for piece in batch:
            self._compute(piece)
        return super().run(batch)

    def forget(self, sequence: Sequence) -> None:
        self.forgotten.append(sequence.id)

    def digests(self, sequence: Sequence, count: int) -> list[BlockHash]:
        """What the first slots of a sequence hold if all is well."""
        current, answers = root(self.weights), []
        for token in sequence.tokens[:count]:
            current = chain(current, [token])
            answers.append(current)
        return answers

    def slot(self, sequence: Sequence, position: int) -> int:
        size = self.scheduler.page_size
        return sequence.pages[position // size] * size + position % size

    def write(self, sequence: Sequence, start: int, end: int) -> None:
        for position, digest in list(enumerate(self.digests(sequence, end)))[start:]:
            self.memory[self.slot(sequence, position)] = digest

    def _compute(self, piece: Slice) -> None:
        sequence = piece.sequence
        found = [self.memory.get(self.slot(sequence, position)) for position in range(piece.start)]
        assert found == self.digests(sequence, piece.start), f"{sequence!r} attends to somebody else's KV"
        self.write(sequence, piece.start, piece.start + piece.count)

    def _check_batch(self, batch: Seq[Slice]) -> None:
        scheduler, size = self.scheduler, self.scheduler.page_size
        sequences = [piece.sequence for piece in batch]
        assert batch
        assert len(set(sequences)) == len(sequences)
        assert set(sequences) <= set(scheduler.running)
        prefill = [p for p in batch if not (p.count == 1 and p.sequence.output_len and p.sample)]
        assert sum(piece.count for piece in prefill) <= scheduler.chunk
        decoding = {s for s in scheduler.running if s.output_len and s.pending_len == 1}
        assert decoding <= set(sequences), "a decoding sequence was left out"
        for piece in batch:
            sequence, end = piece.sequence, piece.start + piece.count
            assert piece.count >= 1
            assert piece.start == sequence.computed_len
            assert piece.sample == (end == sequence.total_len)
            assert len(sequence.pages) * size >= end, "the pages do not cover the slice"
            written = set(sequence.pages[piece.start // size : -(-end // size)])
            for other in scheduler.running:
                assert other is sequence or not written & set(other.pages), "two sequences share a page that is written"
