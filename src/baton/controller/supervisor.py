"""The supervisor's mind: which process is in which state, and what to do about an event. No I/O, no clock.

    WAITING ──▶ STARTING ──▶ LOADING ──▶ READY      (a process may answer before its start is reported)
       ▲            │           │          │
       └─ BACKING_OFF ◀─────────┴──────────┤ died
       ▲                                   │
       └───────── STOPPING ◀───────────────┘ a process it comes after died; or everything stops
                      └──▶ STOPPED

Whoever runs it feeds events and carries out the actions that come back (`baton.controller.run`). Events carry the
number of the run they belong to: news of an earlier run of a process changes nothing.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from baton.controller.spec import ProcessSpec

EX_CONFIG = 78
"""Exit status of a process whose configuration is wrong: trying again would not help."""


class State(Enum):
    WAITING = "waiting"
    """For the processes it comes after."""
    STARTING = "starting"
    """Ordered; no process yet (heavy ones wait until the libraries are imported)."""
    LOADING = "loading"
    """Runs, but its ready check does not pass yet."""
    READY = "ready"
    BACKING_OFF = "backing off"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"


_ENDS = {State.STOPPED, State.FAILED}
_DEATHS = {State.BACKING_OFF, State.STOPPING, *_ENDS}
MOVES = {
    State.WAITING: {State.STARTING, State.STOPPED},
    State.STARTING: {State.LOADING, State.READY, *_DEATHS},
    State.LOADING: {State.READY, *_DEATHS},
    State.READY: _DEATHS,
    State.BACKING_OFF: {State.WAITING, State.STOPPED},
    State.STOPPING: {State.WAITING, *_ENDS},
    State.STOPPED: set(),
    State.FAILED: set(),
}
ALIVE = (State.STARTING, State.LOADING, State.READY, State.STOPPING)


# --- events ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Started:
    name: str
    run: int
    pid: int


@dataclass(frozen=True, slots=True)
class Answered:
    """The ready check passed."""

    name: str
    run: int


@dataclass(frozen=True, slots=True)
class Exited:
    name: str
    run: int
    code: int
    """Negative: the number of the signal that ended it."""
    reason: str = ""
    """If it never began: why."""


@dataclass(frozen=True, slots=True)
class StopAsked:
    """Stop everything in order; asked again, kill everything."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = Started | Answered | Exited | StopAsked | Tick


# --- actions ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Start:
    spec: ProcessSpec
    run: int


@dataclass(frozen=True, slots=True)
class Terminate:
    name: str
    run: int


@dataclass(frozen=True, slots=True)
class Kill:
    name: str
    run: int


@dataclass(frozen=True, slots=True)
class Note:
    """Something a person wants to know; the end of `log` says more."""

    text: str
    log: Path | None = None


Action = Start | Terminate | Kill | Note


@dataclass(frozen=True, slots=True)
class Failure:
    """Why the stack gave up."""

    name: str
    reason: str


@dataclass(slots=True)
class Entry:
    """One process as the supervisor sees it. Times are the clock's."""

    spec: ProcessSpec
    state: State = State.WAITING
    since: float = 0.0
    run: int = 0
    pid: int = 0
    deaths: int = 0
    """In a row."""
    ever_ready: bool = False
    started: float = 0.0
    """When the present run was ordered."""
    deadline: float | None = None
    """When the present state ends by itself."""


class Supervisor:
    def __init__(self, specs: Iterable[ProcessSpec], now: float) -> None:
        self.entries = {spec.name: Entry(spec, since=now) for spec in specs}
        self.stopping = False
        self.failure: Failure | None = None
        self._out: list[Action] = []

    # --- what others look at ---------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Every process is."""
        return all(entry.state is State.READY for entry in self.entries.values())

    @property
    def done(self) -> bool:
        """Told to stop, and nothing is left."""
        return self.stopping and all(entry.state in _ENDS for entry in self.entries.values())

    def next_deadline(self) -> float | None:
        return min((e.deadline for e in self.entries.values() if e.deadline is not None), default=None)

    def __repr__(self) -> str:
        return f"<Supervisor {', '.join(f'{e.spec.name} {e.state.value}' for e in self.entries.values())}>"

    # --- the one entrance ------------------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take in an event; what is to be done because of it, in order."""
        self._take(event, now)
        self._expire(now)
        self._stop_next_rank(now) if self.stopping else self._start_what_may(now)
        out, self._out = self._out, []
        return out

    def _take(self, event: Event, now: float) -> None:
        if isinstance(event, StopAsked):
            self._kill_all() if self.stopping else self._begin_stop(now)
        elif isinstance(event, Started | Answered | Exited):
            entry = self.entries[event.name]
            if event.run != entry.run or entry.state not in ALIVE:
                return  # news of an earlier run
            if isinstance(event, Exited):
                self._exited(entry, event, now)
            elif isinstance(event, Started):
                entry.pid = event.pid
                if entry.state is State.STARTING:
                    self._move(entry, State.LOADING, now, entry.deadline)
            elif entry.state in (State.STARTING, State.LOADING):
                entry.ever_ready = True
                self._move(entry, State.READY, now)

    # --- deaths ----------------------------------------------------------------------------------------------

    def _exited(self, entry: Entry, event: Exited, now: float) -> None:
        if self.stopping:
            self._move(entry, State.STOPPED, now)
        elif entry.state is State.STOPPING:
            self._move(entry, State.WAITING, now)
        else:
            self._died(entry, event, now)

    def _died(self, entry: Entry, event: Exited, now: float) -> None:
        policy, name, code = entry.spec.restart, entry.spec.name, event.code
        words = event.reason or f"ended {how(code)}"
        if entry.state is State.READY and now - entry.since >= policy.healthy_after:
            entry.deaths = 0
        entry.deaths += 1
        if not entry.ever_ready and code == EX_CONFIG:
            return self._give_up(entry, "its configuration is wrong", now)
        if not entry.ever_ready and entry.deaths >= policy.attempts:
            return self._give_up(entry, f"{words}, {entry.deaths} times before it was ready", now)
        delay = policy.delay(entry.deaths)
        log = entry.spec.log if code > 0 else None  # who was killed had no time for words
        self._out.append(Note(f"{name} {words}; restart in {delay:g} s", log))
        self._move(entry, State.BACKING_OFF, now, now + delay)
        self._stop_dependents(name, now)
        return None

    def _stop_dependents(self, name: str, now: float) -> None:
        """They start again when what they come after is ready again."""
        for other in self.entries.values():
            if name in other.spec.after and other.state in (State.STARTING, State.LOADING, State.READY):
                self._terminate(other, now)
                self._stop_dependents(other.spec.name, now)

    def _give_up(self, entry: Entry, reason: str, now: float) -> None:
        self.failure = Failure(entry.spec.name, reason)
        self._move(entry, State.FAILED, now)
        self._begin_stop(now)

    # --- time ------------------------------------------------------------------------------------------------

    def _expire(self, now: float) -> None:
        for entry in self.entries.values():
            if entry.deadline is None or now < entry.deadline:
                continue
            entry.deadline = None
            if entry.state is State.BACKING_OFF:
                self._move(entry, State.WAITING, now)
            elif entry.state is State.STOPPING:
                self._out.append(Note(f"{entry.spec.name} did not stop in {entry.spec.stop_timeout:g} s: killed"))
                self._out.append(Kill(entry.spec.name, entry.run))
            elif entry.state in (State.STARTING, State.LOADING):
                self._too_slow(entry, now)

    def _too_slow(self, entry: Entry, now: float) -> None:
        """Killed; its death is counted when it is seen."""
        self._out.append(Note(f"{entry.spec.name} is not ready after {entry.spec.startup_timeout:g} s"))
        self._out.append(Kill(entry.spec.name, entry.run))
        if not entry.ever_ready and self.failure is None:
            self.failure = Failure(entry.spec.name, f"not ready after {entry.spec.startup_timeout:g} s")
            self._begin_stop(now)

    def _start_what_may(self, now: float) -> None:
        for entry in self.entries.values():
            if entry.state is State.WAITING and self._after_ready(entry):
                entry.run += 1
                entry.pid = 0
                entry.started = now
                self._move(entry, State.STARTING, now, now + entry.spec.startup_timeout)
                self._out.append(Start(entry.spec, entry.run))

    def _after_ready(self, entry: Entry) -> bool:
        return all(self.entries[name].state is State.READY for name in entry.spec.after)

    # --- the end ---------------------------------------------------------------------------------------------

    def _begin_stop(self, now: float) -> None:
        self.stopping = True
        for entry in self.entries.values():
            if entry.state in (State.WAITING, State.BACKING_OFF):
                self._move(entry, State.STOPPED, now)

    def _stop_next_rank(self, now: float) -> None:
        alive = [entry for entry in self.entries.values() if entry.state in ALIVE]
        rank = min((entry.spec.stop_rank for entry in alive), default=0)
        for entry in alive:
            if entry.spec.stop_rank == rank and entry.state is not State.STOPPING:
                self._terminate(entry, now)

    def _terminate(self, entry: Entry, now: float) -> None:
        self._move(entry, State.STOPPING, now, now + entry.spec.stop_timeout)
        self._out.append(Terminate(entry.spec.name, entry.run))

    def _kill_all(self) -> None:
        self._out += [Kill(e.spec.name, e.run) for e in self.entries.values() if e.state in ALIVE]

    def _move(self, entry: Entry, state: State, now: float, deadline: float | None = None) -> None:
        assert state in MOVES[entry.state], f"{entry.spec.name}: {entry.state.value} -> {state.value}"
        entry.state, entry.since, entry.deadline = state, now, deadline


def how(code: int) -> str:
    """An exit status in words: `by SIGKILL`, `with status 1`."""
    if code >= 0:
        return f"with status {code}"
    try:
        return f"by {signal.Signals(-code).name}"
    except ValueError:
        return f"by signal {-code}"
