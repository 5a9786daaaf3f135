"""Histories of arrivals, aborts and deadlines on both sides of a real pair: whatever happens, all pages come back."""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from baton.base.messages import Abort, Generate, Sampling, Ticket
from tests.e2e.nodes import Pair, Whole, config, drive, pair, whole


@pytest.fixture(scope="module", params=["shm", "tcp"])
def divided(request: pytest.FixtureRequest, tiny_model_dir: Path) -> Iterator[Pair]:
    with pair(config(tiny_model_dir), request.param) as stack:
        yield stack


@pytest.fixture(scope="module")
def undivided(tiny_model_dir: Path) -> Iterator[Whole]:
    with whole(config(tiny_model_dir)) as stack:
        yield stack


ROUNDS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(1, 90), st.integers(1, 30)),
        st.tuples(st.just("only prefill"), st.integers(1, 90), st.just(1)),
        st.tuples(st.just("only decode"), st.integers(1, 90), st.just(1)),
        st.tuples(st.just("late"), st.integers(1, 90), st.integers(1, 30)),
        st.tuples(st.just("abort both"), st.integers(0, 20), st.just(0)),
        st.tuples(st.just("abort prefill"), st.integers(0, 20), st.just(0)),
        st.tuples(st.just("abort decode"), st.integers(0, 20), st.just(0)),
        st.tuples(st.just("step prefill"), st.integers(1, 3), st.just(0)),
        st.tuples(st.just("step decode"), st.integers(1, 3), st.just(0)),
        st.tuples(st.just("breathe"), st.integers(1, 3), st.just(0)),
    ),
    min_size=4,
    max_size=40,
)


class Storm:
    """Plays one history. `survivors` are the requests that nobody disturbed."""

    def __init__(self, stack: Pair, name: str) -> None:
        self.stack, self.name = stack, name
        self.ids: list[str] = []
        self.survivors: dict[str, tuple[list[int], Sampling]] = {}
        self.room = secrets.randbits(62)  # `random` is seeded by hypothesis: rooms would meet again

    def play(self, what: str, amount: int, output: int) -> None:
        prefill, decode = self.stack.prefill, self.stack.decode
        match what:
            case "submit" | "only prefill" | "only decode" | "late":
                self.submit(what, amount, output)
            case "abort both" | "abort prefill" | "abort decode" if self.ids:
                id = self.ids[amount % len(self.ids)]
                self.survivors.pop(id, None)
                for side in (prefill, decode):
                    if what == "abort both" or (what == "abort prefill") == (side is prefill):
                        side.hear(side.assembly.engine.handle(Abort(id)))
            case "step prefill" | "step decode":
                side = prefill if what == "step prefill" else decode
                for _ in range(amount):
                    side.step()
            case "breathe":
                time.sleep(0.001 * amount)  # the movers and the network get their turn

    def submit(self, what: str, length: int, output: int) -> None:
        self.room += 1
        id = f"{self.name}-{len(self.ids)}"
        self.ids.append(id)
        tokens = random.Random(length).choices(range(10, 200), k=length)
        sampling = Sampling(max_tokens=output, seed=length, temperature=0.8)
        ticket = Ticket(self.room, "127.0.0.1", self.stack.prefill.port)
        request = Generate(id, tuple(tokens), sampling, ticket)
        if what == "late":
            request = Generate(id, tuple(tokens), sampling, ticket, deadline=time.monotonic() + 0.005)
        if what in ("submit", "late", "only decode"):
            self.stack.decode.submit(request)
        if what in ("submit", "late", "only prefill"):
            self.stack.prefill.submit(request)
        if what == "submit":
            self.survivors[id] = (tokens, sampling)

    def end(self) -> None:
        """The lonely halves give up, everything else runs to its end."""
        for id in set(self.ids) - set(self.survivors):
            for side in (self.stack.prefill, self.stack.decode):
                side.hear(side.assembly.engine.handle(Abort(id)))
                if id in side.answers and not side.answers[id].done:
                    side.answers.pop(id)
        drive(self.stack.prefill, self.stack.decode)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    derandomize=True,
)
@given(history=ROUNDS, seed=st.integers(0, 2**30))
def test_whatever_happens_all_pages_come_back(
    divided: Pair, undivided: Whole, history: list[tuple[str, int, int]], seed: int
) -> None:
    storm = Storm(divided, f"storm-{seed}-{time.monotonic_ns()}")
    for what, amount, output in history:
        storm.play(what, amount, output)
    storm.end()
    divided.assert_clean()
    for id, (tokens, sampling) in storm.survivors.items():
        answer = divided.decode.answers[id]
        if answer.error is not None:  # refused for want of pages or queue is fine, silence or nonsense is not
            assert answer.error.status in (502, 503), answer.error
            continue
        expected = undivided.run([(id, tokens, sampling)])[id]
        assert answer.tokens == expected.tokens
    for node in (divided.prefill, divided.decode, undivided.node):
        node.answers.clear()
