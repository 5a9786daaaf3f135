"""Who serves a request: a pure decision over a snapshot, by the policies of both sides and the cost of dividing it.

    1. an answering worker (decode or regular), by the decode policy
    2. if it is a decode worker: a prefill worker of its kind, by the prefill policy
    3. divide the request between them, or let the decode worker do it alone?

Every answering worker takes its partners in turn, and begins with another one: so all pairs are used equally (2 x 2
makes four pairs), however many requests go whole in between.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Literal

from baton.base.errors import NotFound
from baton.router import policies
from baton.router.ask import Ask
from baton.router.registry import EMPTY, Candidates, Fleet, Registry, Runtime, Worker
from baton.router.speeds import Speeds
from baton.router.split import Decision, Side, decide
from baton.router.target import Target

Split = Literal["auto", "always", "never"]
HARM = 1.0
"""What a second that a running stream stands still is worth, in seconds of the new request. At a tenth of it the pair
answers sooner under load, and its streams stutter as those of undivided workers do (docs/benchmarks.md)."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """Where a request would go, and why."""

    target: Target | None
    """None: nobody can serve it."""
    why: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PlannerOptions:
    prefill_policy: str = "round_robin"
    decode_policy: str = "round_robin"
    split: Split = "auto"
    min_split_tokens: int = 64
    """Prompts with fewer uncached tokens are not divided."""


class Planner:
    def __init__(self, registry: Registry, options: PlannerOptions, random: Random) -> None:
        self.speeds = Speeds()
        self._registry = registry
        self._options = options
        self._random = random
        self._prefill = policies.build(options.prefill_policy)
        self._decode = policies.build(options.decode_policy)
        self._turn = 0

    def plan(self, ask: Ask, model: str, avoid: frozenset[Worker], runtime: Runtime = "auto") -> Target | None:
        """None: nobody can serve it now. Raises `NotFound` if nobody has the model, and others are served."""
        fleet = self._fleet(model)
        answering = _able(fleet, avoid, runtime) if fleet is not None else EMPTY
        if fleet is None or not answering.workers:
            return None
        turn, random = self._turn, self._random.random
        self._turn = turn + 1
        slot = self._decode.choose(ask, answering.view, turn, random())
        worker = answering.workers[slot]
        target = self._paired(ask, worker, _partners(fleet, worker, avoid), worker.pairs + slot, random())
        self._decode.sent(ask, worker.id)
        if target.prefill is not None:
            worker.pairs += 1
            self._prefill.sent(ask, target.prefill.id)
        return target

    def explain(self, ask: Ask, model: str) -> Explanation:
        """Where such a request would go now; nothing is learned or counted. Raises `NotFound`."""
        fleet = self._fleet(model)
        if fleet is None or not fleet.answering.workers:
            return Explanation(None, ("nobody can serve it",))
        view, turn = fleet.answering.view, self._turn
        slot = self._decode.choose(ask, view, turn, 0.5)
        worker = fleet.answering.workers[slot]
        lines = [f"decode ({self._options.decode_policy}): {self._decode.explain(ask, view, turn, 0.5)}"]
        partners = _partners(fleet, worker, frozenset())
        if partners.workers:
            turn = worker.pairs + slot
            why = self._prefill.explain(ask, partners.view, turn, 0.5)
            lines.append(f"prefill ({self._options.prefill_policy}): {why}")
        target = self._paired(ask, worker, partners, turn, 0.5)
        return Explanation(target, (*lines, f"split ({self._options.split}): {target.reason}"))

    def forget(self, worker: Worker) -> None:
        """It is gone, or was restarted: its cache is empty."""
        self._prefill.forget(worker.id)
        self._decode.forget(worker.id)

    def _paired(self, ask: Ask, worker: Worker, partners: Candidates, turn: int, draw: float) -> Target:
        """With the prefill worker whose turn it is, or alone."""
        if not partners.workers:
            return Target(worker, uncached=ask.prompt_tokens)
        prefill = partners.workers[self._prefill.choose(ask, partners.view, turn, draw)]
        uncached = ask.prompt_tokens - self._prefill.matched(ask, prefill.id)
        divided = Target(worker, prefill, uncached)
        if self._options.split == "always" or not worker.alone:
            return divided
        if self._options.split == "never":
            return Target(worker, uncached=ask.prompt_tokens)
        decision = self._decide(ask, worker, prefill, uncached)
        if decision.split:
            return Target(worker, prefill, uncached, decision)
        return Target(worker, None, decision.uncached, decision)

    def _decide(self, ask: Ask, worker: Worker, prefill: Worker, uncached: int) -> Decision:
        mine = ask.prompt_tokens - self._decode.matched(ask, worker.id)
        costs = self.speeds.costs(self._options.min_split_tokens, HARM)
        here = Side(worker.prefilling, worker.in_flight)
        return decide(ask, uncached, mine, Side(prefill.load), here, costs)

    def _fleet(self, model: str) -> Fleet | None:
        fleets = self._registry.snapshot.fleets
        fleet = fleets.get(model)
        if fleet is None and len(fleets) == 1:
            return next(iter(fleets.values()))  # the worker knows its model's other names
        if fleet is None and fleets and model:
            raise NotFound(f"model {model!r} is not served here; served: {', '.join(sorted(fleets))}", param="model")
        if fleet is None and fleets:
            return fleets[min(fleets)]
        return fleet


def _partners(fleet: Fleet, worker: Worker, avoid: frozenset[Worker]) -> Candidates:
    if worker.role != "decode":
        return EMPTY
    partners = fleet.prefill.get(worker.runtime, EMPTY)
    return partners.without(avoid) if avoid else partners


def _able(fleet: Fleet, avoid: frozenset[Worker], runtime: Runtime) -> Candidates:
    """Who can answer now: alone, or because there is a partner."""
    if not avoid and runtime == "auto":
        return fleet.answering
    out = set(avoid)
    for worker in fleet.answering.workers:
        lonely = not (worker.alone or _partners(fleet, worker, avoid).workers)
        if lonely or runtime not in ("auto", worker.runtime):
            out.add(worker)
    return fleet.answering.without(frozenset(out))
