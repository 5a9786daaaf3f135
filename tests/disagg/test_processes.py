"""Two real processes: equal answers, and a peer that is killed or stands still in the middle."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

import pytest

from baton.base.messages import Abort, Generate, Sampling, Ticket
from tests.disagg.pair import Worker, undivided, worker
from tests.disagg.test_equal import prompt

OPTIONS = {"pages": 256, "chunk": 16}


def prefill_process(line: Connection, transport: str, pause: float) -> None:
    """Serves what comes through `line` until it is closed."""
    woken = threading.Event()
    one = worker("prefill", woken.set, transport=transport, pause=pause, **OPTIONS)  # type: ignore[arg-type]
    line.send(one.role.bootstrap_port)
    try:
        while True:
            if line.poll(0.0 if one.engine.busy else 0.01):
                one.send(line.recv())
            one.turn()
    except EOFError:
        one.close()


class Apart:
    """A prefill worker in a process of its own, a decode worker here."""

    def __init__(self, transport: str, pause: float = 0.0) -> None:
        context = multiprocessing.get_context("spawn")
        self.line, theirs = context.Pipe()
        self.process = context.Process(target=prefill_process, args=(theirs, transport, pause), daemon=True)
        self.process.start()
        theirs.close()
        self.port = self.line.recv()
        self.woken = threading.Event()
        self.decode: Worker = worker("decode", self.woken.set, transport=transport, drain_timeout=0.3, **OPTIONS)  # type: ignore[arg-type]

    def request(self, id: str, tokens: list[int], room: int) -> Generate:
        return Generate(id, tuple(tokens), Sampling(max_tokens=8, seed=room), Ticket(room, "127.0.0.1", self.port))

    def pump(self, until: object, limit: float = 20.0) -> float:
        begun = time.monotonic()
        while not until():  # type: ignore[operator]
            assert time.monotonic() < begun + limit, (self.decode.heard, self.decode.role.handoffs)
            if not self.decode.turn():
                self.woken.wait(0.02)
                self.woken.clear()
        return time.monotonic() - begun

    def under_way(self, request: Generate) -> None:
        """Several chunks are here, several are not."""
        self.decode.send(request)
        self.line.send(request)
        self.pump(lambda: any(i.landed > 4 for i in self.decode.role._by_id.values()))  # type: ignore[attr-defined]

    def close(self) -> None:
        self.line.close()
        self.process.join(10)
        assert self.process.exitcode is not None
        self.process.close()
        self.decode.close()


@pytest.fixture(params=["shm", "tcp"])
def way(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def make_apart() -> Iterator[object]:
    made: list[Apart] = []

    def make(transport: str, pause: float = 0.0) -> Apart:
        made.append(Apart(transport, pause))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_two_processes_say_what_one_engine_says(make_apart: type[Apart], way: str) -> None:
    apart = make_apart(way)
    requests = [apart.request(f"r{i}", prompt(3 + 11 * i, i), i) for i in range(8)]
    for request in requests:
        apart.line.send(request)
        apart.decode.send(request)
    apart.pump(lambda: all(apart.decode.ended(r.id) for r in requests))
    assert {r.id: apart.decode.answer(r.id) for r in requests} == undivided(requests, **OPTIONS)
    apart.pump(apart.decode.idle_and_whole)


def test_p_is_killed_in_the_middle(make_apart: type[Apart], way: str) -> None:
    apart = make_apart(way, 0.02)
    apart.under_way(apart.request("r", prompt(600), 1))
    assert apart.process.pid is not None
    os.kill(apart.process.pid, signal.SIGKILL)
    assert apart.pump(lambda: apart.decode.ended("r")) < 2
    assert apart.decode.failure("r").code == "handoff_lost"
    assert apart.pump(apart.decode.idle_and_whole) < 2


def test_p_stands_still_and_comes_back(make_apart: type[Apart], way: str) -> None:
    """A stopped P answers nothing. Over shm it could write again any time, so its pages stay out of use until it
    has let go of them; over tcp D keeps its bytes out, and has the pages back at once."""
    apart = make_apart(way, 0.02)
    apart.under_way(apart.request("r", prompt(600), 1))
    assert apart.process.pid is not None
    os.kill(apart.process.pid, signal.SIGSTOP)
    apart.decode.send(Abort("r"))
    end = time.monotonic() + 0.6  # past drain-timeout: P has been cut off
    apart.pump(lambda: time.monotonic() > end)
    assert apart.decode.role.handoffs.quarantined_pages == (150 if way == "shm" else 0)
    os.kill(apart.process.pid, signal.SIGCONT)
    apart.pump(apart.decode.idle_and_whole)
    again = apart.request("s", prompt(60), 2)
    apart.line.send(again)
    apart.decode.send(again)
    apart.pump(lambda: apart.decode.ended("s"))
    assert apart.decode.answer("s") == undivided([again], **OPTIONS)["s"]
    apart.pump(apart.decode.idle_and_whole)
