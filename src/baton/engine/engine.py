"""The loop. Messages in, messages out; which role, runner and scheduler it conducts is not its business."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from baton.base.clock import Clock
from baton.base.errors import BatonError, Cancelled, TimedOut
from baton.base.messages import Abort, Failed, Flush, Flushed, Generate, Load, Probe, ToEngine, ToFront, Tokens
from baton.engine.scheduler import Scheduler
from baton.engine.sequence import Sequence
from baton.engine.sockets import NothingToPrepare, Preparation, Role, Runner, Slice


class Engine:
    """One model, one KV pool, one thread.

    `handle` takes what the front says, `step` computes; both return what the front should hear. `busy` says whether
    another `step` has something to compute now: not when all that waits waits for pages that hand-offs hold. Then only
    a message, a hand-off (`role.poll`) or a deadline changes anything, and the loop may sleep until one of them comes.
    """

    def __init__(
        self, scheduler: Scheduler, runner: Runner, role: Role, clock: Clock, preparation: Preparation | None = None
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.role = role
        self.clock = clock
        self.preparation = preparation or NothingToPrepare()
        self._held: dict[str, Sequence] = {}
        """Alive, and not prepared yet; the role has them in whatever stage."""
        self._counters = Counters()
        self._last_batch_empty = True

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting) and not self._last_batch_empty

    def handle(self, message: ToEngine) -> list[ToFront]:
        self._last_batch_empty = False
        match message:
            case Generate():
                return self._submit(message)
            case Abort(id=id):
                return self._end(id, Cancelled("aborted"))
            case Flush(id=id):
                return [Flushed(id, True, self.scheduler.flush())]
            case Probe(id=id):
                return [self.load(id)]

    def step(self) -> list[ToFront]:
        return self.poll() + self.compute()

    def poll(self) -> list[ToFront]:
        """What has arrived, and what has become of it. Separate from `compute`, so that the front hears of a first
        token from a prefill worker before the next forward step, not after it."""
        arrived = self._release() + self.role.poll()
        if arrived:
            self._last_batch_empty = False
        return self._count(arrived)

    def compute(self) -> list[ToFront]:
        """One forward step, if there is something to compute."""
        batch = self.scheduler.next_batch()
        self._last_batch_empty = not batch
        return self._count(self._compute(batch)) if batch else []

    def expire(self) -> list[ToFront]:
        """Fail what has passed its own deadline."""
        now = self.clock.now()
        late = [sequence.id for sequence in self.scheduler if sequence.late(now)]
        return [message for id in late for message in self._end(id, TimedOut.of_request())]

    def next_deadline(self) -> float | None:
        """When `step` or `expire` must be called even if no message comes (Clock time); None: no such time."""
        deadlines = [s.deadline for s in self.scheduler if s.deadline is not None]
        role = self.role.next_deadline()
        return min([*deadlines, role] if role is not None else deadlines, default=None)

    def audit(self) -> None:
        """Cheap enough for every time the engine falls idle: do the pages add up? Raises AssertionError."""
        self.scheduler.check(self.role.handoffs.open + self.role.handoffs.quarantined_pages)

    def load(self, id: str = "") -> Load:
        scheduler, pool, handoffs, counters = self.scheduler, self.scheduler.pool, self.role.handoffs, self._counters
        return Load(
            id,
            len(scheduler.running),
            len(scheduler.waiting) + handoffs.waiting,
            scheduler.waiting_tokens + handoffs.waiting_tokens,
            handoffs.open,
            pool.free,
            pool.cached,
            pool.total,
            handoffs.quarantined_pages,
            counters.prompt_tokens,
            counters.cached_tokens,
            counters.generated_tokens,
            scheduler.retractions,
            counters.steps,
            counters.busy_seconds,
            handoffs.done,
            handoffs.failed,
            handoffs.bytes,
            handoffs.seconds,
            handoffs.waiting,
        )

    def close(self) -> None:
        self.role.close()
        self.preparation.close()

    def _submit(self, request: Generate) -> list[ToFront]:
        try:
            sequence = Sequence.of(request, self.clock.now())
            self.role.submit(sequence)
        except BatonError as error:
            return [Failed.of(request.id, error)]
        self.preparation.begin(sequence)
        if sequence.held:
            self._held[sequence.id] = sequence
        return []

    def _release(self) -> list[ToFront]:
        """What is prepared now may be computed, or fails."""
        messages: list[ToFront] = []
        for sequence, error in self.preparation.done():
            if self._held.get(sequence.id) is sequence:  # else it has ended meanwhile
                self._last_batch_empty = False
                self._let_go(sequence.id)
                messages += self._end(sequence.id, error) if error is not None else []
        return messages

    def _let_go(self, id: str) -> None:
        sequence = self._held.pop(id, None)
        if sequence is not None:
            sequence.held = False

    def _compute(self, batch: Seq[Slice]) -> list[ToFront]:
        started = self.clock.now()
        for piece in batch:
            stamps = piece.sequence.stamps
            if not stamps.scheduled and not stamps.delivered:  # a prompt that was delivered is computed elsewhere
                stamps.scheduled = started
        try:
            results = self.runner.run(batch)
        except BatonError as error:  # the runner blames the request (a grammar that does not compile, say)
            return self._fail(batch, error)
        messages = self.role.commit(batch, results)
        self._counters.steps += 1
        self._counters.busy_seconds += self.clock.now() - started
        self._counters.prompt_tokens += sum(p.count for p in batch if p.start < p.sequence.given_len)
        return messages

    def _fail(self, batch: Seq[Slice], error: BatonError) -> list[ToFront]:
        """Only the sequence the error names (`error.param` is its id) pays; nobody named: all of the batch do."""
        ids = [piece.sequence.id for piece in batch]
        named = [error.param] if error.param in ids else ids
        return [message for id in named for message in self._end(id, _unnamed(error))]

    def _end(self, id: str, error: BatonError) -> list[ToFront]:
        """The sequence fails, in whatever stage it is; nothing if it is not here."""
        self._let_go(id)
        return [Failed.of(id, error)] if self.role.abort(id, error) else []

    def _count(self, messages: list[ToFront]) -> list[ToFront]:
        for message in messages:
            if self._held and (isinstance(message, Failed) or (isinstance(message, Tokens) and message.finish)):
                self._let_go(message.id)
            if isinstance(message, Tokens):
                self._counters.generated_tokens += len(message.tokens)
                if message.usage is not None:
                    self._counters.cached_tokens += message.usage.cached_tokens
        return messages


def _unnamed(error: BatonError) -> BatonError:
    """The same for a client, to whom our ids are not names of fields."""
    error.param = None
    return error


class Counters:
    """What `Load` reports since start."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generated_tokens = 0
        self.steps = 0
        self.busy_seconds = 0.0
