"""What a person sees of a starting stack: a table that moves in a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from baton.base.clock import Clock, MonotonicClock
from baton.controller.supervisor import Entry, State, Supervisor

SAYS = {
    State.WAITING: ("waiting", "dim"),
    State.STARTING: ("starting", "cyan"),
    State.LOADING: ("loading", "cyan"),
    State.READY: ("ready", "green"),
    State.BACKING_OFF: ("restarting soon", "yellow"),
    State.STOPPING: ("stopping", "yellow"),
    State.STOPPED: ("stopped", "dim"),
    State.FAILED: ("failed", "red"),
}


def words(entry: Entry) -> str:
    """The state of a process for a person."""
    if entry.state is State.WAITING and entry.spec.after:
        return f"waiting for {', '.join(entry.spec.after)}"
    if entry.state is State.STARTING and entry.spec.heavy:
        return "starting (importing torch)"
    return SAYS[entry.state][0]


class Screen(Console):
    """Rich's console ends the program when its pipe breaks; a supervisor has better things to do."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class Display:
    """Follows a stack. `on_ready` is called once, when everything is ready for the first time."""

    def __init__(
        self, on_ready: Callable[[], None], *, console: Console | None = None, clock: Clock | None = None
    ) -> None:
        self._on_ready = on_ready
        self._console = console or Screen(stderr=True, highlight=False)
        self._clock = clock or MonotonicClock()
        self._seen: dict[str, tuple[State, int]] = {}
        self._announced = False
        self._stopping = False
        self._live: Live | None = None

    def update(self, supervisor: Supervisor) -> None:
        if not self._announced and not supervisor.stopping:
            self._follow(supervisor)
            if supervisor.ready:
                self._announced = True
                self._end_live()
                self._on_ready()
        elif self._announced and not supervisor.stopping:
            self._returns(supervisor)
        if supervisor.stopping and not self._stopping:
            self._stopping = True
            self._end_live()
            if supervisor.failure is None:
                self._console.print("stopping (Ctrl-C again: at once)")
        self._seen = {name: (entry.state, entry.run) for name, entry in supervisor.entries.items()}

    def note(self, text: str) -> None:
        self._console.print(text, style="dim", markup=False)

    def close(self) -> None:
        self._end_live()

    def _follow(self, supervisor: Supervisor) -> None:
        """The way up."""
        if self._console.is_terminal:
            if self._live is None:
                rows = Rows(supervisor, self._clock)
                self._live = Live(rows.table(), get_renderable=rows.table, console=self._console, transient=False)
                self._live.start()
            self._live.refresh()
            return
        for name, entry in supervisor.entries.items():
            if self._seen.get(name) != (entry.state, entry.run):
                self._console.print(f"{name}: {words(entry)}{_seconds(entry, self._clock)}", markup=False)

    def _returns(self, supervisor: Supervisor) -> None:
        """After the first ready: only who comes back after a restart is worth a line."""
        for name, entry in supervisor.entries.items():
            if entry.state is State.READY and self._seen.get(name) != (State.READY, entry.run):
                self._console.print(f"{name} is ready again{_seconds(entry, self._clock)}", markup=False)

    def _end_live(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


class Rows:
    """The table, drawn anew several times a second by Rich's own thread."""

    def __init__(self, supervisor: Supervisor, clock: Clock) -> None:
        self._supervisor = supervisor
        self._clock = clock
        self._spinners = {name: Spinner("dots") for name in supervisor.entries}

    def table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for name, entry in self._supervisor.entries.items():
            mark = {State.READY: Text("✓", "green"), State.FAILED: Text("✗", "red"), State.WAITING: Text("·", "dim")}
            style = SAYS[entry.state][1]
            table.add_row(
                mark.get(entry.state) or self._spinners[name],
                name,
                Text(words(entry), style),
                Text(_seconds(entry, self._clock).strip(), "dim"),
            )
        return table


def _seconds(entry: Entry, clock: Clock) -> str:
    """How long the present run took to be ready, or has taken so far."""
    if entry.state is State.READY:
        return f" {entry.since - entry.started:.1f} s"
    if entry.state in (State.STARTING, State.LOADING) and clock.now() - entry.started >= 0.1:
        return f" {clock.now() - entry.started:.1f} s"
    return ""
