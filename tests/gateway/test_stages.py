"""What timelines mean: stages that add up, spans in their places, headers that cannot break anything."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.gateway.stages import NONE, STAGES, marks, spans, stages
from baton.gateway.timeline import Attempt, Timeline
from baton.gateway.timing import server_timing
from baton.router.health import Limits
from baton.router.origin import Origin
from baton.router.registry import Description, Registry, Role, Worker
from baton.router.target import Target
from baton.router.upstream import Pool

P_SAYS = b"queue;dur=2.000, prefill;dur=30.000, transfer;dur=4.000"
D_SAYS = b"offer;dur=1.000, handoff;dur=37.000, first_token;dur=45.000"


def worker(role: Role, port: int) -> Worker:
    origin = Origin.parse(f"http://127.0.0.1:{port}")
    return Registry(Limits(), lambda _: None).add(origin, Description(role), Pool(origin, connect_timeout=1), 0.0)


P, D, OTHER, ALONE = worker("prefill", 1), worker("decode", 2), worker("decode", 3), worker("regular", 4)


def says(timing: bytes) -> list[tuple[bytes, bytes]]:
    return [(b"content-type", b"text/event-stream"), (b"server-timing", timing)]


def attempt(sent: float, begun: float, ended: float, *, lost: str = "", resumed: bool = False) -> Attempt:
    return Attempt(Target(D, P), sent, begun, ended, lost, says(D_SAYS), says(P_SAYS), resumed)


def timeline(*attempts: Attempt, stream: bool = True, finished: float = 101.0, status: int = 200) -> Timeline:
    first = next((one.begun for one in attempts if one.begun), 0.0) if stream else 0.0
    return Timeline(
        "id", "/generate", 100.0, admitted=100.002, first=first, finished=finished, status=status, stream=stream,
        attempts=list(attempts),
    )  # fmt: skip


def named(one: Timeline) -> dict[str, float]:
    found = [(stage.name, round(1e3 * stage.seconds, 3)) for stage in stages(one, one.finished)]
    assert sum(ms for _, ms in found) == pytest.approx(1e3 * (one.finished - one.received))
    return dict(found)


def test_a_divided_stream_is_explained_to_the_last_millisecond() -> None:
    assert named(timeline(attempt(100.003, 100.060, 100.999))) == {
        "queue": 2.0,
        "route": 1.0,
        "transit": 12.0,
        "offer": 1.0,
        "prefill_queue": 1.0,
        "prefill": 30.0,
        "transfer": 6.0,
        "decode_queue": 7.0,
        "decode": 939.0,
        "reply": 1.0,
    }


def test_a_divided_whole_answer() -> None:
    one = attempt(100.003, 100.999, 100.9995)
    one.answer = says(D_SAYS + b", decode;dur=900.000")
    found = named(timeline(one, stream=False))
    assert found["decode"] == 900.0
    assert found["transit"] == 51.0
    assert found["reply"] == 1.0


def test_without_the_receipt_the_prefill_is_not_told_apart_from_the_hand_off() -> None:
    one = attempt(100.003, 100.060, 100.999)
    one.receipt = ()
    found = named(timeline(one))
    assert "prefill" not in found
    assert found["transfer"] == 37.0


def test_an_undivided_worker() -> None:
    one = Attempt(Target(ALONE), 100.003, 100.060, 100.999)
    one.answer = says(b"queue;dur=5.000, prefill;dur=20.000, first_token;dur=26.000")
    found = named(timeline(one))
    assert (found["prefill_queue"], found["prefill"], found["decode_queue"]) == (5.0, 20.0, 1.0)
    assert "transfer" not in found


def test_a_worker_that_says_nothing_is_one_stage() -> None:
    one = Attempt(Target(D, P), 100.003, 100.060, 100.999)
    assert named(timeline(one)) == {"queue": 2.0, "route": 1.0, "worker": 57.0, "decode": 939.0, "reply": 1.0}


def test_lost_attempts_are_a_stage_of_their_own() -> None:
    lost = [attempt(100.003, 0.0, 100.1, lost="prefill refused"), attempt(100.15, 0.0, 100.2, lost="decode reset")]
    found = named(timeline(*lost, attempt(100.21, 100.26, 100.999)))
    assert found["retry"] == 207.0
    assert found["prefill"] == 30.0


def test_a_stream_that_goes_on_elsewhere() -> None:
    begun = attempt(100.003, 100.060, 100.5, lost="decode reset")
    failed = attempt(100.51, 0.0, 100.52, lost="decode refused", resumed=True)
    one = timeline(begun, failed, attempt(100.53, 100.6, 100.999, resumed=True))
    found = [(stage.name, round(1e3 * stage.seconds)) for stage in stages(one, one.finished)]
    assert found[-4:] == [("decode", 440), ("resume", 100), ("decode", 399), ("reply", 1)]


def test_a_stream_that_nobody_could_go_on_with() -> None:
    found = named(timeline(attempt(100.003, 100.060, 100.5, lost="decode reset")))
    assert (found["decode"], found["resume"]) == (440.0, 500.0)


def test_what_was_never_sent() -> None:
    refused = Timeline("id", "other", 100.0, finished=100.5, status=429)
    assert named(refused) == {"queue": 500.0}
    nobody = Timeline("id", "other", 100.0, admitted=100.1, finished=110.0, status=503)
    assert named(nobody) == {"queue": 100.0, "route": 9900.0}


def test_what_is_not_over_is_explained_so_far() -> None:
    one = Timeline("id", "/generate", 100.0, admitted=100.002, attempts=[Attempt(Target(D, P), 100.003)])
    assert sum(stage.seconds for stage in stages(one, 100.5)) == pytest.approx(0.5)
    assert {span.lane for span in spans(one, 100.5)} == {"gateway", D.name, P.name}


@given(
    st.binary(max_size=80),
    st.lists(st.tuples(st.sampled_from([*STAGES, "handoff", "first_token"]), st.floats(0, 1e7)), max_size=12),
    st.lists(st.floats(0, 50), min_size=4, max_size=4),
)
def test_workers_can_say_what_they_like(noise: bytes, said: list[tuple[str, float]], moments: list[float]) -> None:
    """Whatever they say, stages add up and go forward."""
    sent, begun, ended, finished = (100.002 + seconds for seconds in sorted(moments))
    header = noise + b", " + b", ".join(b"%b;dur=%.3f" % (key.encode(), ms) for key, ms in said)
    one = Attempt(Target(D, P), sent, begun, ended)
    one.answer = one.receipt = says(header)
    whole = timeline(one, finished=finished)
    found = stages(whole, finished)
    assert math.isclose(sum(stage.seconds for stage in found), finished - 100.0, abs_tol=1e-6)
    assert all(stage.seconds > 0 and stage.name in STAGES for stage in found)
    for span in spans(whole, finished):
        assert span.end >= span.start >= 100.0 or span.lane != "gateway"


def test_marks_of_hostile_headers() -> None:
    assert marks([]) is not None
    assert marks(says(b"prefill;dur=1e9999, queue;dur=-4, offer;dur=nan, first_token")).prefill <= 1e-3
    assert marks(says(b"__class__;dur=3, head;dur=4")) == NONE
    assert marks(says(b"queue;dur=1, queue;dur=2")).queue == 0.001
    assert marks(says(b"queue ; dur=1.5, prefill;dur=2;desc=x")).queue == 0.0015


def test_spans_show_who_did_what() -> None:
    begun = attempt(100.003, 100.060, 100.5, lost="decode reset")
    after = attempt(100.53, 100.6, 100.999, resumed=True)
    after.target = Target(OTHER, P)
    found = list(spans(timeline(begun, after), 101.0))
    lanes = {span.lane for span in found}
    assert lanes == {"gateway", P.name, D.name, OTHER.name}
    prefill = next(span for span in found if span.lane == P.name and span.name == "prefill")
    assert prefill.end - prefill.start == pytest.approx(0.030)
    assert [span.attempt for span in found if span.name == "decode"] == [1, 2]
    assert next(span for span in found if span.name == "relay").note == "decode reset"


def test_the_header_for_clients() -> None:
    own, receipt = server_timing(timeline(attempt(100.003, 100.060, 0.0)))
    assert own == (b"server-timing", b"gateway_queue;dur=2.000, route;dur=1.000, worker;dur=57.000")
    assert receipt == (b"server-timing", P_SAYS)
    lost = attempt(100.003, 0.0, 100.1, lost="prefill refused")
    assert b"retry;dur=207.000" in server_timing(timeline(lost, attempt(100.21, 100.26, 0.0)))[0][1]
    early = attempt(100.003, 0.0, 0.0)
    early.receipt = ()
    [own] = server_timing(timeline(early))
    assert own[1].endswith(b"worker;dur=0.000")


def test_the_time_between_tokens_is_one_sequences() -> None:
    one = timeline(attempt(100.0, 100.5, 100.9), finished=101.0)
    one.output_tokens = 11
    assert one.token_seconds() == pytest.approx(0.05)
    one.output_tokens, one.sequences = 22, 2
    assert one.token_seconds() == pytest.approx(0.05)
    one.error = "it broke off"
    assert one.token_seconds() == 0.0
    short = timeline(attempt(100.0, 100.5, 100.9))
    short.output_tokens = 1
    assert short.token_seconds() == 0.0
