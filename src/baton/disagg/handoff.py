"""What prefill (P) and decode (D) owe each other, as a table. Pure: no I/O, no clock, no pages.

Both sides keep a `Handoff` of their own; the words mean the same on either:

    WAITING    one side has the request and knows nothing of the other: nobody can write anything
    QUEUED     D has it too, and waits for pages of its own: as long as that takes, while it says so
    READY      D's pages are reserved and P knows them: from here on bytes may come
    MOVING     bytes have come
    DONE       D has checked the manifest and every page
    DRAINING   lost, but the peer may still be writing: nobody may have the pages
    LOST       lost, and still

Only DONE and LOST let pages go (DONE: to the running sequence; LOST: back to the pool).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from baton.base.config import DisaggConfig


class State(enum.Enum):
    WAITING = "waiting"
    QUEUED = "queued"
    READY = "ready"
    MOVING = "moving"
    DONE = "done"
    DRAINING = "draining"
    LOST = "lost"

    @property
    def terminal(self) -> bool:
        return self in (State.DONE, State.LOST)


class Event(enum.Enum):
    QUEUED = "queued"
    """D: the way to P stands, pages are short. P: D says so."""
    OFFERED = "offered"
    """D: pages reserved and offered. P: the offer arrived."""
    STARTED = "started"
    """The first bytes moved."""
    DELIVERED = "delivered"
    """D: the manifest is verified. P: D says so."""
    CANCELLED = "cancelled"
    """Somebody asked for it: the user, or the peer."""
    EXPIRED = "expired"
    """A deadline of ours passed."""
    BROKEN = "broken"
    """The peer is gone, gave up, broke the rules, or the bytes are wrong."""
    SETTLED = "settled"
    """No byte of it can arrive any more."""


_LOSSES = (Event.CANCELLED, Event.EXPIRED, Event.BROKEN)

TABLE: dict[State, dict[Event, State]] = {
    State.WAITING: {
        Event.QUEUED: State.QUEUED,
        Event.OFFERED: State.READY,
        **dict.fromkeys(_LOSSES, State.LOST),
    },
    State.QUEUED: {Event.OFFERED: State.READY, **dict.fromkeys(_LOSSES, State.LOST)},
    State.READY: {Event.STARTED: State.MOVING, **dict.fromkeys(_LOSSES, State.DRAINING)},
    State.MOVING: {Event.DELIVERED: State.DONE, **dict.fromkeys(_LOSSES, State.DRAINING)},
    State.DRAINING: {Event.SETTLED: State.LOST, **dict.fromkeys(_LOSSES, State.DRAINING)},
    State.DONE: {},
    State.LOST: {},
}


class OutOfTurn(Exception):
    """An event that the table does not have for this state; nothing was changed."""


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds, see `DisaggConfig`."""

    meet: float
    move: float
    drain: float

    @classmethod
    def of(cls, config: DisaggConfig) -> Patience:
        return cls(config.meet_timeout, config.move_timeout, config.drain_timeout)

    @property
    def beat(self) -> float:
        """How often one gives a sign of life, so that the other hears several within either patience."""
        return min(self.meet, self.move) / 4


@dataclass(slots=True, eq=False)
class Handoff:
    """One attempt: a room, and the epoch that tells it from any other attempt in the same room."""

    room: int
    since: float
    """When the present state began."""
    epoch: int = 0
    state: State = State.WAITING
    seen: float = 0.0
    """The peer's last sign of life in this matter."""
    met: bool = False
    """The peer knows the room too: it may take its time, as long as it gives signs of life."""

    def apply(self, event: Event, now: float) -> State:
        """Raises `OutOfTurn`."""
        following = TABLE[self.state].get(event)
        if following is None:
            raise OutOfTurn(f"room {self.room}: {event.value} while {self.state.value}")
        if following is not self.state:
            self.state, self.since, self.seen = following, now, now
        return following

    def deadline(self, patience: Patience) -> float:
        """When `EXPIRED` is due."""
        match self.state:
            case State.WAITING:
                return self.since + patience.meet
            case State.READY:
                return self.seen + (patience.move if self.met else patience.meet)
            case State.QUEUED | State.MOVING:
                return self.seen + patience.move
            case State.DRAINING:
                return self.since + patience.drain
        return float("inf")


def diagram() -> str:
    """The table as a Mermaid state diagram, for the docs."""
    arrows: dict[tuple[State, State], list[str]] = {}
    for state, row in TABLE.items():
        for event, following in row.items():
            if following is not state:
                arrows.setdefault((state, following), []).append(event.value)
    lines = [f"    {a.value} --> {b.value}: {' / '.join(events)}" for (a, b), events in arrows.items()]
    ends = [f"    {state.value} --> [*]" for state in State if state.terminal]
    return "\n".join(["stateDiagram-v2", f"    [*] --> {State.WAITING.value}", *lines, *ends])
