"""Random histories of requests, aborts, retries in the same room, and turns on either side: nothing hangs, nothing is
lost, and every answer that is given is the right one."""

from __future__ import annotations

import threading

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from baton.base.messages import Abort, Failed, Generate
from baton.transports.base import Transport, create
from baton.transports.loopback import LoopbackTransport, Network
from baton.transports.region import Region
from tests.disagg.pair import Pair, undivided, worker
from tests.disagg.test_equal import prompt

REQUESTS = 5
ACTIONS = st.one_of(
    st.tuples(st.sampled_from(["prefill", "decode", "both"]), st.integers(0, REQUESTS - 1)),
    st.tuples(st.sampled_from(["abort prefill", "abort decode"]), st.integers(0, REQUESTS - 1)),
    st.tuples(st.sampled_from(["turn prefill", "turn decode", "wait"]), st.just(0)),
)


def play(transport: str, lengths: list[int], history: list[tuple[str, int]], small: bool) -> None:
    woken, network = threading.Event(), Network()

    def transports(region: Region) -> dict[str, Transport]:
        if transport == "loopback":
            return {"loopback": LoopbackTransport(region, woken.set, network)}
        return {transport: create(transport, region, woken.set)}

    options = {"transports": transports, "chunk": 8, "meet_timeout": 0.3, "pages": 20 if small else 64}
    p = worker("prefill", woken.set, **options)  # type: ignore[arg-type]
    d = worker("decode", woken.set, **options)  # type: ignore[arg-type]
    pair = Pair(p, d, woken)
    requests = [pair.request(f"r{i}", prompt(length, i % 2), i) for i, length in enumerate(lengths)]
    sent: dict[str, list[Generate]] = {"prefill": [], "decode": []}
    try:
        for action, number in history:
            request = requests[number]
            for name, one in (("prefill", p), ("decode", d)):
                if action in (name, "both") and request not in sent[name]:
                    sent[name].append(request)
                    one.send(request)
                elif action == f"abort {name}":
                    one.send(Abort(request.id))
                elif action == f"turn {name}":
                    one.turn()
            if action == "wait":
                woken.wait(0.003)
                woken.clear()
        pair.pump(lambda: all(p.ended(r.id) for r in sent["prefill"]) and all(d.ended(r.id) for r in sent["decode"]))
        pair.settle()
        answered = [r for r in sent["decode"] if not isinstance(d.heard[r.id][-1], Failed)]
        expected = undivided(answered)
        assert {r.id: d.answer(r.id) for r in answered} == expected
    finally:
        pair.close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.integers(1, 40), min_size=REQUESTS, max_size=REQUESTS), st.lists(ACTIONS, max_size=40), st.booleans()
)
def test_any_history_over_loopback(lengths: list[int], history: list[tuple[str, int]], small: bool) -> None:
    play("loopback", lengths, history, small)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.integers(1, 40), min_size=REQUESTS, max_size=REQUESTS), st.lists(ACTIONS, max_size=40), st.booleans()
)
def test_any_history_over_shm(lengths: list[int], history: list[tuple[str, int]], small: bool) -> None:
    play("shm", lengths, history, small)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.integers(1, 40), min_size=REQUESTS, max_size=REQUESTS), st.lists(ACTIONS, max_size=40), st.booleans()
)
def test_any_history_over_tcp(lengths: list[int], history: list[tuple[str, int]], small: bool) -> None:
    play("tcp", lengths, history, small)
