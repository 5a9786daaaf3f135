"""Runs a stack until somebody stops it: the supervisor's mind, the launcher's hands, and one inbox between them."""

from __future__ import annotations

import contextlib
import queue
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Protocol

from baton.base.clock import Clock, MonotonicClock
from baton.controller.local import Launcher, LocalLauncher
from baton.controller.probe import Inbox
from baton.controller.rundir import RunDirectory, tail
from baton.controller.spec import ProcessSpec
from baton.controller.supervisor import Action, Event, Kill, Note, Start, StopAsked, Supervisor, Terminate, Tick

NURSERY = "nursery"
"""Name of the fork server's log."""


class Watcher(Protocol):
    """Shows a person what happens: `baton.controller.display`."""

    def update(self, supervisor: Supervisor) -> None:
        """Something may have changed."""
        ...

    def note(self, text: str) -> None: ...

    def close(self) -> None: ...


class Nobody:
    """The null watcher."""

    def update(self, supervisor: Supervisor) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


class Unbreakable:
    """A watcher that stops showing when its terminal or pipe is gone: the stack goes on."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher

    def update(self, supervisor: Supervisor) -> None:
        with self._guard() as watcher:
            watcher.update(supervisor)

    def note(self, text: str) -> None:
        with self._guard() as watcher:
            watcher.note(text)

    def close(self) -> None:
        with self._guard() as watcher:
            watcher.close()

    @contextlib.contextmanager
    def _guard(self) -> Iterator[Watcher]:
        try:
            yield self._watcher
        except OSError:
            self._watcher = Nobody()


def run_stack(
    specs: Callable[[RunDirectory], Sequence[ProcessSpec]], watcher: Watcher, *, preload: Sequence[str] = ()
) -> int:
    """Start what `specs` says, keep it running, stop it on SIGINT or SIGTERM (a second one forces).

    Returns the exit code: 0 after an ordered stop, 1 if the stack gave up (the run directory is kept then, and the
    log of the process at fault shown). Raises `ConfigError` before anything is started.
    """
    rundir = RunDirectory.create()
    try:
        wanted = specs(rundir)
    except BaseException:
        rundir.remove()
        raise
    try:
        supervisor = _supervise(wanted, rundir, watcher, preload)
    except BaseException:
        rundir.keep()
        raise
    if supervisor.failure is None:
        rundir.remove()
        return 0
    report(supervisor, rundir)
    return 1


def _supervise(
    specs: Sequence[ProcessSpec], rundir: RunDirectory, watcher: Watcher, preload: Sequence[str]
) -> Supervisor:
    """From nothing to nothing; the supervisor that comes back knows how it went."""
    inbox, clock = Inbox(), MonotonicClock()
    supervisor = Supervisor(specs, clock.now())
    watcher = Unbreakable(watcher)
    with contextlib.closing(watcher), stop_signals(inbox):
        watcher.note(f"logs: {rundir.path}")
        with contextlib.closing(LocalLauncher(inbox, preload, rundir.log(NURSERY))) as launcher:
            if any(spec.heavy for spec in specs):
                launcher.warm_up()
            conduct(supervisor, launcher, inbox, clock, watcher)
    return supervisor


def conduct(supervisor: Supervisor, launcher: Launcher, inbox: Inbox, clock: Clock, watcher: Watcher) -> None:
    """The loop: an event comes, the supervisor decides, the launcher acts. Until nothing is left to supervise."""
    event: Event = Tick()
    while True:
        for action in supervisor.handle(event, clock.now()):
            _perform(action, launcher, watcher)
        watcher.update(supervisor)
        if supervisor.done:
            return
        event = _next(inbox, supervisor.next_deadline(), clock)


@contextlib.contextmanager
def stop_signals(inbox: Inbox) -> Iterator[None]:
    """Signals only write a letter; the loop acts. The old handlers come back at the end."""

    def ask(number: int, frame: FrameType | None) -> None:
        inbox.put(StopAsked())

    wanted = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
        wanted.append(signal.SIGHUP)
    old = {number: signal.signal(number, ask) for number in wanted}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def report(supervisor: Supervisor, rundir: RunDirectory) -> None:
    """Says on stderr which process failed, why, what it wrote last, and where the rest is."""
    failure = supervisor.failure
    assert failure is not None
    log = supervisor.entries[failure.name].spec.log
    lines = tail(log) or tail(rundir.log(NURSERY))
    kept = rundir.keep()
    text = [f"error: {failure.name}: {failure.reason}"]
    text += [f"  | {line}" for line in lines]
    text += [f"all logs: {kept}"]
    with contextlib.suppress(OSError):  # nobody listens
        sys.stderr.write("\n".join(text) + "\n")


def _perform(action: Action, launcher: Launcher, watcher: Watcher) -> None:
    match action:
        case Start(spec, run):
            launcher.start(spec, run)
        case Terminate(name, run):
            launcher.terminate(name, run)
        case Kill(name, run):
            launcher.kill(name, run)
        case Note(text, log):
            words = tail(log, 1) if log is not None else []
            watcher.note("\n".join([text, *(f"  | {line}" for line in words)]))


def _next(inbox: Inbox, deadline: float | None, clock: Clock) -> Event:
    try:
        return inbox.get(timeout=None if deadline is None else max(0.0, deadline - clock.now()))
    except queue.Empty:
        return Tick()
