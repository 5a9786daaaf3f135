import io
from pathlib import Path

from rich.console import Console

from baton.base.clock import ManualClock
from baton.controller.display import Display
from baton.controller.spec import PathCheck, ProcessSpec
from baton.controller.supervisor import Answered, Event, Exited, Started, StopAsked, Supervisor, Tick


class Shown:
    """A display on paper, and a supervisor that it follows."""

    def __init__(self, terminal: bool = False) -> None:
        check = PathCheck(Path("p"))
        specs = [
            ProcessSpec("front", "m:f", Path("l"), check),
            ProcessSpec("engine", "m:f", Path("l"), check, heavy=True, after=("front",)),
        ]
        self.clock = ManualClock()
        self.paper = io.StringIO()
        console = Console(file=self.paper, force_terminal=terminal, width=60, highlight=False)
        self.display = Display(lambda: console.print("ALL READY"), console=console, clock=self.clock)
        self.supervisor = Supervisor(specs, 0.0)
        self.feed(Tick())

    def feed(self, *events: Event, after: float = 1.0) -> None:
        for event in events:
            self.clock.advance(after)
            self.supervisor.handle(event, self.clock.now())
            self.display.update(self.supervisor)

    def up(self) -> None:
        for name in ("front", "engine"):
            self.feed(Started(name, 1, 7), Answered(name, 1))


def test_plain_lines_where_there_is_no_terminal() -> None:
    shown = Shown()
    shown.up()
    shown.display.note("engine ended by SIGKILL; restart in 0.2 s")
    shown.feed(Exited("engine", 1, -9), Tick(), Started("engine", 2, 8), Answered("engine", 2))
    shown.feed(StopAsked(), StopAsked())
    shown.display.close()
    assert shown.paper.getvalue().splitlines() == [
        "front: starting",
        "engine: waiting for front",
        "front: loading 1.0 s",
        "front: ready 2.0 s",
        "engine: starting (importing torch)",
        "engine: loading 1.0 s",
        "engine: ready 2.0 s",
        "ALL READY",
        "engine ended by SIGKILL; restart in 0.2 s",
        "engine is ready again 2.0 s",
        "stopping (Ctrl-C again: at once)",
    ]


def test_a_table_in_a_terminal() -> None:
    shown = Shown(terminal=True)
    shown.up()
    shown.display.close()
    last = shown.paper.getvalue().rsplit("\x1b[2K", 1)[-1]
    assert "✓" in last
    assert "engine" in last
    assert "ALL READY" in last


def test_the_cursor_comes_back_when_a_start_is_broken_off() -> None:
    shown = Shown(terminal=True)
    shown.feed(StopAsked())
    shown.display.close()
    assert shown.paper.getvalue().rindex("\x1b[?25h") > shown.paper.getvalue().rindex("\x1b[?25l")
