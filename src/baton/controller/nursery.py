"""The fork server: imports the heavy libraries once, then forks a process from that state whenever asked.

An engine starts in the time it takes to load its weights instead of the time it takes to import torch, again so
after a crash, and all engines share the memory of the libraries. One thread, one loop over two inputs: orders from
the supervisor, and SIGCHLD.

    supervisor ──▶ nursery   Fork · Signal
    supervisor ◀── nursery   Hatched · Forked · Gone

When the supervisor dies the nursery ends with it (end of file; the kernel's parent-death signal during imports),
after its children, who see the end of their lifeline. When the nursery dies, its children are killed with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

from baton.controller import child
from baton.controller.child import Job


@dataclass(frozen=True, slots=True)
class Fork:
    run: int
    job: Job
    log: Path


@dataclass(frozen=True, slots=True)
class Signal:
    name: str
    run: int
    number: int


@dataclass(frozen=True, slots=True)
class Hatched:
    """The libraries are imported."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Forked:
    name: str
    run: int
    pid: int


@dataclass(frozen=True, slots=True)
class Gone:
    name: str
    run: int
    code: int


class Nursery:
    """The server's side. Only it signals its children, because only it knows that a pid is still theirs."""

    def __init__(self, control: Connection, lifeline: int) -> None:
        self._control = control
        self._lifeline = lifeline
        self._children: dict[int, tuple[str, int]] = {}
        self._alarm, self._bell = socket.socketpair()
        self._alarm.setblocking(False)
        self._bell.setblocking(False)

    def serve(self) -> None:
        """Until the supervisor closes the control connection."""
        signal.set_wakeup_fd(self._bell.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        with selectors.DefaultSelector() as selector:
            selector.register(self._control, selectors.EVENT_READ)
            selector.register(self._alarm, selectors.EVENT_READ)
            with contextlib.suppress(EOFError, ConnectionError):
                while True:
                    self._turn([key.fileobj for key, _ in selector.select()])
            selector.unregister(self._control)
            self._outlive_children(selector)

    def _outlive_children(self, selector: selectors.BaseSelector) -> None:
        """The supervisor is gone: whoever is left has the time for last words, and is killed with us after it."""
        deadline = time.monotonic() + child.LAST_WORDS + 0.5
        while self._children and (left := deadline - time.monotonic()) > 0:
            if selector.select(left):
                self._listen()
                self._children = {pid: whose for pid, whose in self._children.items() if _reaped(pid) is None}

    def _turn(self, inputs: list[object]) -> None:
        if self._alarm in inputs:
            self._listen()
            self._reap()
        if self._control in inputs:
            self._obey(self._control.recv())

    def _obey(self, order: Fork | Signal) -> None:
        if isinstance(order, Fork):
            self._fork(order)
        else:
            for pid, whose in self._children.items():
                if whose == (order.name, order.run):
                    os.kill(pid, order.number)

    def _fork(self, order: Fork) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._become(order, parent)
        self._children[pid] = (order.job.name, order.run)
        self._control.send(Forked(order.job.name, order.run, pid))

    def _become(self, order: Fork, parent: int) -> NoReturn:
        """In the child: let go of what is the server's, then live. Never returns into the server's loop."""
        code = 1
        try:
            if not die_with_parent(parent):
                os._exit(code)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._control.close()
            self._alarm.close()
            self._bell.close()
            os.setsid()
            log = os.open(order.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.close(log)
            code = child.live(order.job, self._lifeline)
            sys.stdout.flush()
            sys.stderr.flush()
        except Exception:  # noqa: BLE001 (as in child.live: to the log)
            traceback.print_exc()
        finally:
            os._exit(code)

    def _listen(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._alarm.recv(4096)

    def _reap(self) -> None:
        for pid in list(self._children):
            code = _reaped(pid)
            if code is not None:
                name, run = self._children.pop(pid)
                self._control.send(Gone(name, run, code))


def _reaped(pid: int) -> int | None:
    """The exit code of a child that has ended; None: it lives."""
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def die_with_parent(parent: int, number: int = signal.SIGKILL) -> bool:
    """Linux: have the kernel send a signal when the parent ends (0: never mind). False: it has ended already."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    return os.getppid() == parent


def main(control: int, lifeline: int, parent: int, preload: Sequence[str]) -> None:
    import faulthandler

    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not die_with_parent(parent):
        return
    begun = time.monotonic()
    for name in preload:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a child's collections leave the shared pages alone
    die_with_parent(parent, 0)  # from here on the loop sees it, and lets the children end first
    connection = Connection(control)
    connection.send(Hatched(time.monotonic() - begun))
    Nursery(connection, lifeline).serve()


if __name__ == "__main__":
    import json

    _orders = json.loads(sys.stdin.buffer.readline())
    sys.path[:] = _orders["path"]
    from baton.controller import nursery

    nursery.main(_orders["control"], _orders["lifeline"], _orders["parent"], _orders["preload"])
