"""Histories: what happens, and what the supervisor decides. No process, no clock."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from baton.controller.spec import PathCheck, ProcessSpec, RestartPolicy
from baton.controller.supervisor import (
    ALIVE,
    EX_CONFIG,
    Action,
    Answered,
    Event,
    Exited,
    Kill,
    Note,
    Start,
    Started,
    State,
    StopAsked,
    Supervisor,
    Terminate,
    Tick,
    how,
)


def process(name: str, *after: str, rank: int = 0) -> ProcessSpec:
    return ProcessSpec(name, "m:f", Path("log"), PathCheck(Path("p")), after=after, stop_rank=rank, stop_timeout=5.0)


def stack() -> list[ProcessSpec]:
    return [process("front", rank=1), process("engine", "front", rank=2), process("gateway")]


class History:
    """A supervisor, a time, and what it has said to do since somebody looked."""

    def __init__(self, specs: list[ProcessSpec]) -> None:
        self.now = 100.0
        self.supervisor = Supervisor(specs, self.now)
        self._actions: list[Action] = []
        self.feed(Tick())

    def feed(self, *events: Event) -> History:
        for event in events:
            self._actions += self.supervisor.handle(event, self.now)
        return self

    def wait(self, seconds: float) -> History:
        """Time passes; whoever runs the supervisor wakes it at each of its deadlines."""
        end = self.now + seconds
        while (deadline := self.supervisor.next_deadline()) is not None and deadline <= end:
            self.now = max(self.now, deadline)
            self.feed(Tick())
        self.now = end
        return self.feed(Tick())

    def up(self, *names: str) -> History:
        """They start and answer, in this order."""
        for name in names:
            run = self.supervisor.entries[name].run
            self.feed(Started(name, run, 1), Answered(name, run))
        return self

    def dies(self, name: str, code: int = -9) -> History:
        return self.feed(Exited(name, self.supervisor.entries[name].run, code))

    def orders(self) -> list[str]:
        """Since the last time, without the notes."""
        words = [_word(action) for action in self._actions if not isinstance(action, Note)]
        self._actions = []
        return words

    def notes(self) -> list[str]:
        found = [action.text for action in self._actions if isinstance(action, Note)]
        self._actions = []
        return found


def _word(action: Action) -> str:
    match action:
        case Start(spec, run):
            return f"start {spec.name} {run}"
        case Terminate(name, run):
            return f"terminate {name} {run}"
        case Kill(name, run):
            return f"kill {name} {run}"
        case Note(text):
            return text


def test_a_process_starts_when_those_before_it_are_ready() -> None:
    history = History(stack())
    assert history.orders() == ["start front 1", "start gateway 1"]
    history.feed(Started("front", 1, 7))
    assert history.orders() == []
    assert repr(history.supervisor) == "<Supervisor front loading, engine waiting, gateway starting>"
    history.feed(Answered("front", 1))
    assert history.orders() == ["start engine 1"]
    assert not history.supervisor.ready
    history.up("engine", "gateway")
    assert history.supervisor.ready


def test_an_engine_that_died_starts_again_after_a_pause_and_nobody_else_does() -> None:
    history = History(stack()).up("front", "engine", "gateway")
    history.orders()
    history.dies("engine")
    assert history.notes() == ["engine ended by SIGKILL; restart in 0.2 s"]
    assert history.wait(0.19).orders() == []
    assert history.wait(0.02).orders() == ["start engine 2"]
    assert history.up("engine").supervisor.ready


def test_a_front_that_died_takes_its_engine_along() -> None:
    history = History(stack()).up("front", "engine", "gateway")
    history.orders()
    history.dies("front", 1)
    assert history.orders() == ["terminate engine 1"]
    assert history.wait(0.2).orders() == ["start front 2"]
    assert history.up("front").orders() == []  # the engine is still there
    assert history.dies("engine", 0).orders() == ["start engine 2"]  # its end was wanted: no pause
    assert history.up("engine").supervisor.ready


def test_an_engine_that_ends_with_its_front_waits_for_it() -> None:
    history = History(stack()).up("front", "engine", "gateway")
    history.orders()
    history.dies("engine", 0).dies("front", -11)
    assert history.wait(0.2).orders() == ["start front 2"]
    assert history.wait(5.0).orders() == []
    assert history.up("front").orders() == ["start engine 2"]


def test_a_chain_of_dependents_restarts_whole() -> None:
    history = History([process("a"), process("b", "a"), process("c", "b")]).up("a", "b", "c")
    history.orders()
    assert history.dies("a").orders() == ["terminate b 1", "terminate c 1"]


def test_an_orphan_that_does_not_hear_is_killed() -> None:
    history = History(stack()).up("front", "engine", "gateway").dies("front")
    history.wait(4.9)
    history.orders()
    history.wait(0.2)
    assert history.orders() == ["kill engine 1"]


def test_pauses_double_up_to_a_limit_and_begin_anew_after_good_health() -> None:
    history = History([process("engine")]).up("engine")
    pauses = []
    for _ in range(8):
        history.notes()
        history.dies("engine")
        pauses.append(history.notes()[0].rsplit(" restart in ")[1])
        history.wait(10.0).up("engine")
    assert pauses == ["0.2 s", "0.4 s", "0.8 s", "1.6 s", "3.2 s", "6.4 s", "10 s", "10 s"]
    history.wait(30.0).notes()
    assert history.dies("engine").notes() == ["engine ended by SIGKILL; restart in 0.2 s"]


def test_the_stack_gives_up_on_a_process_that_never_gets_ready() -> None:
    history = History(stack()).up("front", "gateway")
    history.dies("engine", 1).wait(0.2).dies("engine", 1).wait(0.4)
    history.orders()
    history.dies("engine", 1)
    failure = history.supervisor.failure
    assert failure is not None
    assert (failure.name, failure.reason) == ("engine", "ended with status 1, 3 times before it was ready")
    assert history.orders() == ["terminate gateway 1"]
    assert history.dies("gateway", 0).orders() == ["terminate front 1"]
    assert history.dies("front", 0).supervisor.done
    assert history.supervisor.entries["engine"].state is State.FAILED


def test_a_process_that_was_ready_once_is_never_given_up() -> None:
    history = History([process("engine")]).up("engine")
    for _ in range(20):
        history.dies("engine", 1).wait(10.0)
    assert history.supervisor.failure is None
    assert history.supervisor.entries["engine"].run == 21


def test_a_wrong_configuration_is_not_tried_again() -> None:
    history = History(stack()).up("front")
    history.dies("engine", EX_CONFIG)
    assert history.supervisor.failure is not None
    assert history.supervisor.failure.reason == "its configuration is wrong"


def test_a_start_that_takes_too_long_ends_the_stack() -> None:
    history = History([process("engine")]).feed(Started("engine", 1, 7))
    history.orders()
    history.wait(299.0)
    assert history.orders() == []
    history.wait(1.0)
    assert history.orders() == ["kill engine 1", "terminate engine 1"]
    assert history.dies("engine").supervisor.done
    assert history.supervisor.failure is not None
    assert history.supervisor.failure.reason == "not ready after 300 s"


def test_a_restart_that_takes_too_long_is_tried_again() -> None:
    history = History([process("engine")]).up("engine").dies("engine").wait(0.2)
    history.orders()
    assert history.wait(300.0).orders() == ["kill engine 2"]
    assert history.dies("engine").wait(0.4).orders() == ["start engine 3"]


def test_a_stop_goes_rank_by_rank() -> None:
    history = History(stack()).up("front", "engine", "gateway")
    history.orders()
    assert history.feed(StopAsked()).orders() == ["terminate gateway 1"]
    assert history.dies("gateway", 0).orders() == ["terminate front 1"]
    history.dies("engine", 0)  # it saw its front's channel close
    assert history.orders() == []
    assert not history.supervisor.done
    assert history.dies("front", 0).supervisor.done
    assert history.supervisor.failure is None


def test_who_does_not_stop_is_killed() -> None:
    history = History(stack()).up("front", "engine", "gateway").feed(StopAsked())
    history.orders()
    assert history.wait(5.0).orders() == ["kill gateway 1"]
    assert history.dies("gateway").orders() == ["terminate front 1"]


def test_a_second_request_to_stop_kills_everything() -> None:
    history = History(stack()).up("front", "engine", "gateway").feed(StopAsked())
    history.orders()
    assert history.feed(StopAsked()).orders() == ["kill front 1", "kill engine 1", "kill gateway 1"]
    history.dies("front").dies("engine").dies("gateway")
    assert history.supervisor.done


def test_a_stop_while_starting_and_backing_off() -> None:
    history = History(stack())
    history.dies("gateway", 1)
    history.orders()
    assert history.feed(StopAsked()).orders() == ["terminate front 1"]
    assert history.wait(60.0).orders() == ["kill front 1"]  # no restart
    assert history.dies("front").supervisor.done


def test_news_of_an_earlier_run_changes_nothing() -> None:
    history = History([process("engine")]).up("engine").dies("engine").wait(0.2)
    history.orders()
    before = repr(history.supervisor)
    history.feed(Exited("engine", 1, -9), Answered("engine", 1), Started("engine", 1, 3))
    assert history.orders() == []
    assert repr(history.supervisor) == before == "<Supervisor engine starting>"


def test_an_exit_status_in_words() -> None:
    assert how(-15) == "by SIGTERM"
    assert how(2) == "with status 2"
    assert how(-123) == "by signal 123"


@given(st.integers(1, 10_000))
def test_pauses_are_bounded(deaths: int) -> None:
    policy = RestartPolicy()
    assert policy.first_delay <= policy.delay(deaths) <= policy.max_delay


class AnyHistory(RuleBasedStateMachine):
    """Whatever happens, in any order: orders are obeyed by an ideal launcher, and the supervisor keeps its books."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.supervisor = Supervisor(stack(), 0.0)
        self.running: dict[str, int] = {}
        self.told: set[str] = set()
        self.feed(Tick())

    def feed(self, event: Event) -> None:
        for action in self.supervisor.handle(event, self.now):
            if isinstance(action, Start):
                assert action.spec.name not in self.running, "started twice"
                assert not self.supervisor.stopping
                self.running[action.spec.name] = action.run
            elif isinstance(action, Kill | Terminate):
                self.told.add(action.name)

    @rule(name=st.sampled_from(["front", "engine", "gateway"]), code=st.sampled_from([0, 1, -9, EX_CONFIG]))
    def exits(self, name: str, code: int) -> None:
        run = self.running.pop(name, None)
        self.told.discard(name)
        if run is not None:
            self.feed(Exited(name, run, code))

    @rule(name=st.sampled_from(["front", "engine", "gateway"]), started=st.booleans())
    def lives(self, name: str, started: bool) -> None:
        run = self.running.get(name)
        if run is not None:
            self.feed(Started(name, run, 1) if started else Answered(name, run))

    @rule(name=st.sampled_from(["front", "engine", "gateway"]), run=st.integers(0, 3))
    def old_news(self, name: str, run: int) -> None:
        if run < self.supervisor.entries[name].run:
            before = repr(self.supervisor)
            self.feed(Exited(name, run, 1))
            assert repr(self.supervisor) == before

    @rule(seconds=st.sampled_from([0.05, 0.5, 6.0, 400.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.feed(Tick())

    @precondition(lambda self: not self.supervisor.stopping)
    @rule()
    def stop(self) -> None:
        self.feed(StopAsked())

    @invariant()
    def books_are_right(self) -> None:
        alive = {name for name, entry in self.supervisor.entries.items() if entry.state in ALIVE}
        assert alive == set(self.running)
        deadline = self.supervisor.next_deadline()
        assert deadline is None or deadline > self.now, "a deadline that has passed must be dealt with"
        if self.supervisor.done:
            assert not self.running

    def teardown(self) -> None:
        """From any state a stop ends in nothing running, if processes end when they are told to."""
        if not self.supervisor.stopping:
            self.feed(StopAsked())
        for _ in range(10):
            for name in list(self.told):
                self.exits(name, 0)
        assert self.supervisor.done
        assert not self.running


AnyHistory.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestAnyHistory = AnyHistory.TestCase
