"""One prompt on its way out of P: what is known of it, and what is said of it."""

from __future__ import annotations

from dataclasses import dataclass

from baton.base.messages import Finish, Tokens
from baton.disagg.bootstrap import Link
from baton.disagg.handoff import Handoff, Patience, State
from baton.disagg.sender import Stream
from baton.disagg.wire import Manifest, Offer
from baton.engine.sequence import Sequence
from baton.engine.sockets import Sampled


@dataclass(slots=True, eq=False)
class Outgoing:
    sequence: Sequence
    handoff: Handoff
    link: Link | None = None
    """Of the D that has the request too."""
    offer: Offer | None = None
    stream: Stream | None = None
    pushed: int = 0
    """How many of the prompt's pages the mover has been given (D's own prefix counts)."""
    flying: int = 0
    """Pages held by pushes that have not passed."""
    first: Sampled | None = None
    """The prompt is computed, and this is how the answer begins."""
    finished: bool = False
    """The manifest is on its way after the pages."""
    shelved: bool = False
    """It was computed, and its pages were needed: out of the scheduler until the offer comes."""
    told: float = 0.0
    """When D last heard of us."""

    @property
    def parked(self) -> bool:
        """Computed, and holding its pages until an offer comes."""
        return self.first is not None and self.offer is None

    @property
    def due(self) -> bool:
        """D holds pages for it, and it is not computed."""
        return self.first is None and self.offer is not None

    def manifest(self, offer: Offer, fingerprint: str) -> Manifest:
        sequence, first = self.sequence, self.first
        assert first is not None
        assert first.token is not None
        return Manifest(
            offer.room,
            offer.epoch,
            sequence.given_len,
            len(offer.pages),
            first.token,
            first.logprob,
            sequence.sampling.seed,
            sequence.usage_cached_len,
            fingerprint,
        )

    def receipt(self) -> Tokens:
        """What P's front hears when D has accepted: one token, finish `length`."""
        sequence, first = self.sequence, self.first
        assert first is not None
        assert first.token is not None
        return Tokens(
            sequence.id,
            (first.token,),
            (first.logprob,) if first.logprob is not None else (),
            tuple(sequence.prompt_logprobs),
            sequence.usage_cached_len,
            Finish("length"),
            sequence.usage(),
            sequence.stamps.freeze(),
        )

    def complaint(self, patience: Patience) -> str:
        """Why patience with D has ended."""
        room = self.handoff.room
        match self.handoff.state:
            case State.WAITING:
                return f"no decode worker came to room {room} within {patience.meet:g} s (meet-timeout)"
            case State.QUEUED:
                return (
                    f"no sign of life for {patience.move:g} s (move-timeout) from the decode worker that waited "
                    f"for pages for room {room}"
                )
        return f"the decode worker did not accept the pages in room {room} within {patience.move:g} s (move-timeout)"
