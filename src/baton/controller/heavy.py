"""The supervisor's side of the fork server (`baton.controller.nursery`)."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from baton.controller import nursery
from baton.controller.child import LAST_WORDS, Job
from baton.controller.nursery import Fork, Forked, Gone, Hatched, Signal
from baton.controller.probe import Inbox, Prober
from baton.controller.supervisor import Exited, Started


class NurseryClient:
    """Keeps a nursery: opened when first needed, and again if it died."""

    def __init__(self, inbox: Inbox, preload: Sequence[str], log: Path, prober: Prober) -> None:
        self._inbox = inbox
        self._preload = preload
        self._log = log
        self._prober = prober
        self._link: Link | None = None

    def open(self) -> Link:
        if self._link is None or self._link.dead:
            self.close()
            self._link = Link(self._inbox, self._preload, self._log, self._prober)
        return self._link

    def fork(self, run: int, job: Job, log: Path) -> None:
        self.open().fork(Fork(run, job, log))

    def signal(self, name: str, run: int, number: signal.Signals) -> None:
        if self._link is not None:
            self._link.signal(Signal(name, run, number))

    def close(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None


class Link:
    """One nursery, from its start to its end, with all runs that were asked of it."""

    def __init__(self, inbox: Inbox, preload: Sequence[str], log: Path, prober: Prober) -> None:
        self._inbox = inbox
        self._prober = prober
        self._lock = threading.Lock()
        self._runs: set[tuple[str, int]] = set()
        self._waiting: list[Fork] = []
        """Asked for while the nursery still imports."""
        self._hatched = False
        self.dead = False
        self._process, self._socket, self._lifeline = _launch(preload, log)
        self._control = Connection(os.dup(self._socket.fileno()))
        self._reader = threading.Thread(target=self._read, name="nursery")
        self._reader.start()

    def fork(self, order: Fork) -> None:
        with self._lock:
            self._runs.add((order.job.name, order.run))
            if self.dead:
                self._all_gone(1)
            elif self._hatched:
                self._send(order)
            else:
                self._waiting.append(order)

    def signal(self, order: Signal) -> None:
        with self._lock:
            if any((fork.job.name, fork.run) == (order.name, order.run) for fork in self._waiting):
                self._waiting = [f for f in self._waiting if (f.job.name, f.run) != (order.name, order.run)]
                self._gone(order.name, order.run, -order.number)
            elif (order.name, order.run) in self._runs:
                self._send(order)

    def close(self) -> None:
        """The nursery ends when it sees the control connection end; its children, when the lifeline does."""
        with contextlib.suppress(OSError):  # it closed first
            self._socket.shutdown(socket.SHUT_RDWR)
        if not self._hatched:
            self._process.kill()  # it has no children yet, and does not look
        os.close(self._lifeline)
        self._reader.join()
        self._control.close()
        self._socket.close()

    def _send(self, order: Fork | Signal) -> None:
        with contextlib.suppress(OSError):  # dead: the reader tells
            self._control.send(order)

    def _read(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                self._take(self._control.recv())
        try:
            code = self._process.wait(LAST_WORDS + 1)
        except subprocess.TimeoutExpired:  # it hangs
            self._process.kill()
            code = self._process.wait()
        with self._lock:
            self.dead = True
            self._all_gone(code or 1)

    def _take(self, news: object) -> None:
        if isinstance(news, Hatched):
            with self._lock:
                self._hatched = True
                waiting, self._waiting = self._waiting, []
                for order in waiting:
                    self._send(order)
        elif isinstance(news, Forked):
            self._inbox.put(Started(news.name, news.run, news.pid))
        elif isinstance(news, Gone):
            with self._lock:
                self._gone(news.name, news.run, news.code)

    def _all_gone(self, code: int) -> None:
        for name, run in list(self._runs):
            self._gone(name, run, code)

    def _gone(self, name: str, run: int, code: int) -> None:
        self._runs.discard((name, run))
        self._prober.drop(name, run)
        self._inbox.put(Exited(name, run, code))


ENGINE_ENVIRONMENT = {"GOMP_SPINCOUNT": "2000", "THP_MEM_ALLOC_ENABLE": "1"}
"""Libraries read this when they are loaded, so it must stand before the preload; the user's own settings win.

OpenMP: threads that wait for each other spin for some microseconds and then sleep, because an engine shares its cores
with fronts, gateway and whatever else runs. Spinning for long, as is the default, makes a step many times slower on a
busy machine; sleeping at once halves prefill on a quiet one (docs/benchmarks.md). torch: large tensors lie in huge
pages where the system grants them, for weights are read from one end to the other at every step."""


def _launch(preload: Sequence[str], log: Path) -> tuple[subprocess.Popen[bytes], socket.socket, int]:
    """The process, our end of its control connection, and the end of the lifeline that is ours to hold."""
    ours, theirs = socket.socketpair()
    ear, lifeline = os.pipe()
    orders = {"path": sys.path, "control": theirs.fileno(), "lifeline": ear, "parent": os.getpid()}
    try:
        with log.open("ab") as output, theirs:
            process = subprocess.Popen(
                [sys.executable, "-P", nursery.__file__],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,
                pass_fds=(theirs.fileno(), ear),
                env={**ENGINE_ENVIRONMENT, **os.environ},
            )
    finally:
        os.close(ear)
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin:
        process.stdin.write(json.dumps({**orders, "preload": list(preload)}).encode() + b"\n")
    return process, ours, lifeline
