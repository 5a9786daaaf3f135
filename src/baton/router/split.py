"""Whether a request is divided between a prefill and a decode worker, or done by the decode worker alone.

    split: P's queue, P computes, the pages move
    whole: D's queue, D computes, and its streams stand still meanwhile

Both are seconds until the first token, estimated from measured speeds (`speeds.py`); the streams' delay is added to the
latter at a discount, since a stream that stutters is not a request that waits. Pure: no clock, no I/O.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from baton.router.ask import Ask


@dataclass(frozen=True, slots=True)
class Side:
    """What a worker has to do already."""

    waiting_prompt_tokens: int = 0
    """Not computed yet and not cached: what a new request waits for."""
    running_sequences: int = 0
    """Sequences it decodes: what a prompt computed there would hold up."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Speeds, and what the operator wants. Rates are above 0."""

    prefill_speed: float
    """Tokens per second on the prefill worker."""
    local_speed: float
    """Tokens per second when the decode worker computes prompts."""
    handoff_base: float
    """Seconds that a hand-off takes however little moves."""
    handoff_per_token: float
    """Further seconds for each token the decode worker lacks."""
    min_split_tokens: int = 64
    """What is less is computed where it is needed."""
    harm_weight: float = 0.1
    """What a second of a running stream is worth, in seconds of the new request. 0: streams do not count."""
    margin: float = 1.25
    """A decode worker that computes prompts delays those who come after, too, which nobody can foresee: to go whole, a
    request must be so many times faster."""


class Decision(msgspec.Struct, frozen=True):
    """Divide or not, with the numbers it was made from; the sentence is made when somebody asks (`reason`)."""

    split: bool
    uncached: int
    """Tokens the decode worker lacks."""
    whole_seconds: float
    """Until the first token if the decode worker does it alone."""
    harm_seconds: float = 0.0
    """Weighed delay of its streams."""
    split_seconds: float | None = None
    """Until the first token if it is divided; None: it cannot be."""
    queue_seconds: float = 0.0
    """The part of it that waits for the prefill worker."""
    streams: int = 0
    threshold: int = 0
    """The `min_split_tokens` it fell below; 0 if it did not."""

    @property
    def seconds(self) -> float:
        """Until the first token, the way it was decided."""
        return self.split_seconds if self.split and self.split_seconds is not None else self.whole_seconds

    @property
    def reason(self) -> str:
        """As in "whole: 12 uncached tokens < 64"."""
        if self.split_seconds is None:
            return "whole: no prefill worker"
        if self.threshold:
            return f"whole: {self.uncached} uncached tokens < {self.threshold}"
        prefill = f"prefill side {'takes' if self.split else 'would take'} {_seconds(self.split_seconds)}"
        queue = f" ({_seconds(self.queue_seconds)} queue)" if self.queue_seconds else ""
        decode = f"decode side {'would take' if self.split else 'takes'} {_seconds(self.whole_seconds)}"
        harm = f" + {_seconds(self.harm_seconds)} harm to {_streams(self.streams)}" if self.streams else ""
        return f"{'split' if self.split else 'whole'}: {prefill}{queue}, {decode}{harm}"


def decide(ask: Ask, uncached_p: int, uncached_d: int, p: Side | None, d: Side, costs: Costs) -> Decision:
    """`uncached_p`, `uncached_d`: tokens of the prompt that either worker has not cached. `p` None: there is no prefill
    worker. D's pages are all that moves, so a hand-off costs what D lacks, whatever P has."""
    lacking_p, lacking_d = (min(max(tokens, 0), ask.prompt_tokens) for tokens in (uncached_p, uncached_d))
    local = lacking_d / costs.local_speed
    whole = d.waiting_prompt_tokens / costs.local_speed + local
    harm = local * d.running_sequences * costs.harm_weight
    if p is None:
        return Decision(False, lacking_d, whole, harm, streams=d.running_sequences)
    queue = p.waiting_prompt_tokens / costs.prefill_speed
    handoff = costs.handoff_base + costs.handoff_per_token * lacking_d
    split = queue + lacking_p / costs.prefill_speed + handoff
    tiny = lacking_d < costs.min_split_tokens
    return Decision(
        split=not tiny and split <= costs.margin * (whole + harm),
        uncached=lacking_d,
        whole_seconds=whole,
        harm_seconds=harm,
        split_seconds=split,
        queue_seconds=queue,
        streams=d.running_sequences,
        threshold=costs.min_split_tokens if tiny else 0,
    )


def _streams(n: int) -> str:
    return "1 stream" if n == 1 else f"{n} streams"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{seconds * 1e3:.1f} ms"
