"""Real processes, tiny targets: starts, crashes, stops, and what is left behind (nothing)."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from baton.base.clock import MonotonicClock
from baton.controller.local import LocalLauncher
from baton.controller.probe import Inbox
from baton.controller.resources import free_ports
from baton.controller.run import conduct
from baton.controller.spec import Check, HttpCheck, PathCheck, ProcessSpec, RestartPolicy
from baton.controller.supervisor import Event, Exited, Note, State, StopAsked, Supervisor

from . import targets

T = f"{targets.__name__}:"
QUICK = RestartPolicy(first_delay=0.05)


class Stack:
    """Supervises in this very process; `until` looks on after every event."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.inbox = Inbox()
        self.launcher = LocalLauncher(self.inbox, ["json"], directory / "nursery.log")
        self.notes: list[str] = []
        self.specs: list[ProcessSpec] = []
        self._until: Callable[[Supervisor], bool] = lambda supervisor: False

    def add(
        self, name: str, function: str, *, ready: Check | None = None, heavy: bool = False, **options: object
    ) -> ProcessSpec:
        kwargs = options.pop("kwargs", {})
        path = self.directory / f"{name}.ready"
        if ready is None and isinstance(kwargs, dict) and "path" not in kwargs:
            kwargs = {"path": str(path), **kwargs}
        spec = ProcessSpec(
            name, T + function, self.directory / f"{name}.log", ready or PathCheck(path), kwargs,
            heavy=heavy, restart=QUICK, **options,  # type: ignore[arg-type]
        )  # fmt: skip
        self.specs.append(spec)
        return spec

    def start(self) -> Supervisor:
        self.supervisor = Supervisor(self.specs, MonotonicClock().now())
        return self.supervisor

    def run_until(self, reached: Callable[[Supervisor], bool]) -> None:
        """Supervise until so, or until everything has ended."""
        self._until = reached
        with contextlib.suppress(Reached):
            conduct(self.supervisor, self.launcher, self.inbox, MonotonicClock(), self)

    def stop(self) -> None:
        self.inbox.put(StopAsked())
        self.run_until(lambda supervisor: False)

    def pid(self, name: str) -> int:
        return self.supervisor.entries[name].pid

    def update(self, supervisor: Supervisor) -> None:
        if self._until(supervisor):
            raise Reached

    def note(self, text: str) -> None:
        self.notes.append(text)

    def close(self) -> None:
        self.launcher.close()


def dead(process: psutil.Process) -> bool:
    """Gone, or waiting for an init that does not reap (as in a container)."""
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


class Reached(Exception):
    pass


def all_ready(supervisor: Supervisor) -> bool:
    return supervisor.ready


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    made = Stack(tmp_path)
    yield made
    made.close()
    assert psutil.Process().children(recursive=True) == []


@pytest.fixture(params=[False, True], ids=["light", "heavy"])
def heavy(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_a_process_starts_and_stops(stack: Stack, heavy: bool) -> None:
    stack.add("one", "touch_and_sleep", heavy=heavy)
    stack.start()
    stack.run_until(all_ready)
    process = psutil.Process(stack.pid("one"))
    assert os.getsid(process.pid) == process.pid, "its own session: the terminal's Ctrl-C does not reach it"
    stack.stop()
    assert stack.supervisor.done
    assert dead(process)


def test_an_http_server_is_ready_when_it_answers_200(stack: Stack) -> None:
    port = next(free_ports("127.0.0.1", 31000))
    check = HttpCheck(f"http://127.0.0.1:{port}/ready", token="secret")
    stack.add("server", "serve_http", ready=check, kwargs={"port": port, "ready_after": 0.5})
    stack.start()
    begun = time.monotonic()
    stack.run_until(all_ready)
    assert time.monotonic() - begun >= 0.5
    stack.stop()


def test_a_child_is_pinned_and_has_its_environment(stack: Stack, heavy: bool) -> None:
    core = max(os.sched_getaffinity(0))
    spec = stack.add("one", "facts", heavy=heavy, cores=(core,), env={"BATON_TEST": "here"})
    stack.start()
    stack.run_until(all_ready)
    assert isinstance(spec.ready, PathCheck)
    assert spec.ready.path.read_text() == f"[{core}] here True"
    assert Path(f"/proc/{stack.pid('one')}/comm").read_text() == "one\n"
    stack.stop()


def test_a_killed_process_comes_back(stack: Stack, heavy: bool) -> None:
    stack.add("one", "touch_and_sleep", heavy=heavy)
    stack.add("other", "touch_and_sleep")
    stack.start()
    stack.run_until(all_ready)
    first, other = stack.pid("one"), stack.pid("other")
    os.kill(first, signal.SIGKILL)
    stack.run_until(lambda s: s.ready and s.entries["one"].run == 2)
    assert stack.pid("one") != first
    assert stack.pid("other") == other
    assert stack.notes == ["one ended by SIGKILL; restart in 0.05 s"]
    stack.stop()


def test_a_dependent_restarts_with_what_it_comes_after(stack: Stack) -> None:
    stack.add("front", "touch_and_sleep")
    stack.add("engine", "touch_and_sleep", heavy=True, after=("front",))
    stack.start()
    stack.run_until(all_ready)
    engine = psutil.Process(stack.pid("engine"))
    os.kill(stack.pid("front"), signal.SIGKILL)
    stack.run_until(lambda s: s.ready and s.entries["engine"].run == 2)
    assert dead(engine)
    stack.stop()


def test_a_process_that_dies_twice_and_then_works(stack: Stack, heavy: bool, tmp_path: Path) -> None:
    stack.add("one", "crash_until", heavy=heavy, kwargs={"counter": str(tmp_path / "count"), "lives": 2})
    stack.start()
    stack.run_until(all_ready)
    assert stack.notes == [
        "one ended with status 3; restart in 0.05 s\n  | not yet",
        "one ended with status 3; restart in 0.1 s\n  | not yet",
    ]
    stack.stop()


def test_a_crash_loop_ends_the_stack_and_its_words_are_in_the_log(stack: Stack, heavy: bool) -> None:
    spec = stack.add("bad", "crash", heavy=heavy, ready=PathCheck(stack.directory / "never"))
    stack.add("good", "touch_and_sleep")
    stack.start()
    stack.run_until(lambda s: False)
    failure = stack.supervisor.failure
    assert failure is not None
    assert (failure.name, failure.reason) == ("bad", "ended by SIGKILL, 3 times before it was ready")
    assert spec.log.read_text() == "this is the end\n" * 3


@pytest.mark.parametrize(
    ("function", "reason", "words"),
    [
        ("misconfigured", "its configuration is wrong", "error: weights are missing; pull the model first\n"),
        ("raising", "ended with status 1, 3 times before it was ready", "RuntimeError: no way\n"),
        ("no_such_function", "ended with status 1, 3 times before it was ready", "no_such_function'\n"),
    ],
)
def test_errors_of_a_target(stack: Stack, heavy: bool, function: str, reason: str, words: str) -> None:
    spec = stack.add("bad", function, heavy=heavy, ready=PathCheck(stack.directory / "never"))
    stack.start()
    stack.run_until(lambda s: False)
    assert stack.supervisor.failure is not None
    assert stack.supervisor.failure.reason == reason
    assert spec.log.read_text().endswith(words)


def test_what_cannot_even_be_started_is_tried_again(stack: Stack, tmp_path: Path) -> None:
    missing = tmp_path / "later"
    spec = stack.add("one", "touch_and_sleep")
    stack.specs[0] = dataclasses.replace(spec, log=missing / "log")
    stack.start()
    stack.run_until(lambda s: s.entries["one"].state is State.BACKING_OFF)
    (note,) = stack.notes
    assert note.startswith("one cannot be started: [Errno 2] No such file or directory")
    missing.mkdir()
    stack.run_until(all_ready)
    stack.stop()


def test_who_ignores_sigterm_is_killed(stack: Stack, heavy: bool) -> None:
    stack.add("one", "stubborn", heavy=heavy, stop_timeout=0.2)
    stack.start()
    stack.run_until(all_ready)
    stack.stop()
    assert stack.notes == ["one did not stop in 0.2 s: killed"]


def test_children_of_a_dead_fork_server_die_and_come_back_from_a_new_one(stack: Stack) -> None:
    stack.add("one", "stubborn", heavy=True, stop_timeout=0.2)
    stack.start()
    stack.run_until(all_ready)
    engine = psutil.Process(stack.pid("one"))
    nursery = engine.parent()
    assert nursery is not None
    nursery.kill()
    stack.run_until(lambda s: s.ready and s.entries["one"].run == 2)
    assert dead(engine)
    assert stack.notes == ["one ended by SIGKILL; restart in 0.05 s"]
    stack.stop()


def test_a_stop_does_not_wait_for_the_imports_of_the_fork_server(stack: Stack) -> None:
    stack.launcher.close()
    stack.launcher = LocalLauncher(stack.inbox, [f"{targets.__package__}.slow_import"], stack.directory / "n.log")
    stack.add("one", "touch_and_sleep", heavy=True)
    stack.start()
    stack.run_until(lambda s: s.entries["one"].state is State.STARTING)
    begun = time.monotonic()
    stack.stop()
    stack.close()
    assert time.monotonic() - begun < 1.0


def test_a_fork_server_that_cannot_import_is_a_failure_with_its_log(stack: Stack) -> None:
    stack.launcher.close()
    stack.launcher = LocalLauncher(stack.inbox, ["no_such_library"], stack.directory / "nursery.log")
    stack.add("one", "touch_and_sleep", heavy=True)
    stack.start()
    stack.run_until(lambda s: False)
    assert stack.supervisor.failure is not None
    assert "No module named 'no_such_library'" in (stack.directory / "nursery.log").read_text()


def test_a_closed_launcher_leaves_no_process_even_if_nobody_stopped_them(stack: Stack) -> None:
    stack.add("one", "stubborn", heavy=True)
    stack.add("two", "stubborn")
    stack.start()
    stack.run_until(all_ready)
    stack.close()
    assert psutil.Process().children(recursive=True) == []


def test_each_run_ends_in_exactly_one_exit(stack: Stack, heavy: bool) -> None:
    spec = stack.add("one", "touch_and_sleep", heavy=heavy)
    stack.launcher.start(spec, 1)
    stack.launcher.kill("one", 1)
    stack.launcher.kill("one", 1)
    events: list[Event] = []
    while not any(isinstance(event, Exited) for event in events):
        events.append(stack.inbox.get(timeout=10))
    stack.launcher.kill("one", 1)
    stack.launcher.terminate("nobody", 1)
    with pytest.raises(queue.Empty):
        events.append(stack.inbox.get(timeout=0.2))
    assert not any(isinstance(event, Note) for event in events)
    assert [event.code for event in events if isinstance(event, Exited)] == [-9]


# --- a supervisor in a process of its own ----------------------------------------------------------------------

SUPERVISOR = """
import sys
from pathlib import Path
from baton.controller import rundir
from baton.controller.display import Display
from baton.controller.run import run_stack
from baton.controller.spec import PathCheck, ProcessSpec, RestartPolicy

base, targets, kinds = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
rundir.default_base = lambda: base

def specs(run):
    return [
        ProcessSpec(
            f"{kind}-{i}", f"{targets}:{kind}", run.log(f"{kind}-{i}"), PathCheck(run.socket(f"s{i}")),
            {} if kind in ("crash", "raising") else {"path": str(run.socket(f"s{i}"))}, heavy=heavy,
            restart=RestartPolicy(first_delay=0.05), stop_timeout=1.0,
        )
        for i, (kind, heavy) in enumerate((kind, heavy) for kind in kinds for heavy in (False, True))
    ]

sys.exit(run_stack(specs, Display(lambda: print("READY", flush=True)), preload=["json"]))
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tmp_path / "b"


Starter = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(base: Path) -> Iterator[Starter]:
    """Starts supervisors; those that a failed test leaves are killed."""
    started: list[subprocess.Popen[str]] = []

    def start(*kinds: str) -> subprocess.Popen[str]:
        arguments = [sys.executable, "-c", SUPERVISOR, str(base), targets.__name__, *kinds]
        path = Path(targets.__file__).parents[targets.__name__.count(".")]
        env = {**os.environ, "PYTHONPATH": str(path)}
        started.append(subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env))
        return started[-1]

    yield start
    for supervisor in started:
        if supervisor.poll() is None:
            supervisor.kill()
            supervisor.communicate()


def wait_ready(supervisor: subprocess.Popen[str]) -> list[psutil.Process]:
    """All processes below it, once they are ready."""
    assert supervisor.stdout is not None
    assert supervisor.stdout.readline() == "READY\n"
    return psutil.Process(supervisor.pid).children(recursive=True)


def test_a_signal_stops_everything_and_leaves_nothing(start: Starter, base: Path) -> None:
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        numbers.remove(signal.SIGHUP)  # the tests run under nohup, and so does the supervisor
    for number in numbers:
        supervisor = start("touch_and_sleep")
        below = wait_ready(supervisor)
        assert len(below) == 3  # two processes and the fork server
        assert len(list(base.iterdir())) == 2
        supervisor.send_signal(number)
        _, errors = supervisor.communicate(timeout=10)
        assert supervisor.returncode == 0, errors
        assert all(map(dead, below))
        assert [path.name for path in base.iterdir()] == ["lock"]


def test_a_second_signal_does_not_wait(start: Starter, base: Path) -> None:
    supervisor = start("stubborn")
    below = wait_ready(supervisor)
    begun = time.monotonic()
    supervisor.send_signal(signal.SIGINT)
    assert supervisor.stderr is not None
    while "stopping" not in supervisor.stderr.readline():
        pass
    supervisor.send_signal(signal.SIGINT)
    supervisor.communicate(timeout=10)
    assert time.monotonic() - begun < 1.0
    assert all(map(dead, below))
    assert [path.name for path in base.iterdir()] == ["lock"]


@pytest.mark.parametrize("kind", ["touch_and_sleep", "stubborn", "busy"])
def test_nothing_outlives_a_supervisor_that_was_killed(start: Starter, base: Path, kind: str) -> None:
    supervisor = start(kind)
    below = wait_ready(supervisor)
    supervisor.kill()
    supervisor.communicate(timeout=10)
    assert len(below) == 3
    deadline = time.monotonic() + 2.0
    while not all(map(dead, below)):
        assert time.monotonic() < deadline, [process for process in below if not dead(process)]
        time.sleep(0.01)


def test_the_next_start_sweeps_what_a_killed_one_left(start: Starter, base: Path) -> None:
    first = start("touch_and_sleep")
    wait_ready(first)
    second = start("touch_and_sleep")
    wait_ready(second)
    first.kill()
    first.communicate(timeout=10)
    assert len(list(base.iterdir())) == 3  # lock, the dead one's, the living one's
    third = start("touch_and_sleep")
    wait_ready(third)
    owners = {path.name.split("-")[0] for path in base.iterdir()}
    assert owners == {"lock", str(second.pid), str(third.pid)}
    for supervisor in (second, third):
        supervisor.send_signal(signal.SIGTERM)
        supervisor.communicate(timeout=10)
    assert [path.name for path in base.iterdir()] == ["lock"]


def test_a_failed_start_shows_the_end_of_the_log_and_keeps_the_rest(start: Starter, base: Path) -> None:
    supervisor = start("touch_and_sleep", "crash")
    _, errors = supervisor.communicate(timeout=20)
    assert supervisor.returncode == 1
    assert "ended by SIGKILL, 3 times before it was ready" in errors
    assert "  | this is the end" in errors
    (kept,) = base.glob("failed-*")
    assert errors.endswith(f"all logs: {kept}\n")
    assert not list(kept.glob("*.sock"))
    assert (kept / "crash-2.log").read_text().startswith("this is the end")


def test_a_stack_outlives_its_audience(start: Starter, base: Path) -> None:
    """`baton serve | head -1`, and a terminal that was closed."""
    supervisor = start("touch_and_sleep")
    below = wait_ready(supervisor)
    assert supervisor.stdout is not None
    assert supervisor.stderr is not None
    supervisor.stdout.close()
    supervisor.stderr.close()
    light = next(process for process in below if "child.py" in process.cmdline()[2])
    known = set(below)
    for _ in range(2):
        light.kill()
        deadline = time.monotonic() + 10
        while not (new := set(psutil.Process(supervisor.pid).children(recursive=True)) - known):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        (light,) = new
        known.add(light)
    supervisor.send_signal(signal.SIGTERM)
    assert supervisor.wait(10) == 0
    assert [path.name for path in base.iterdir()] == ["lock"]
