"""The definitions of the metrics, each on records small enough to check by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.lab.metrics import INTERRUPTED, Objectives, Record, Stats, percentile, summarize


def record(
    *chunks: float, sent: float = 0.0, due: float | None = None, tokens: int | None = None, error: str = ""
) -> Record:
    made = Record(0, due, prompt_len=10, asked_len=len(chunks), sent=sent, chunks=list(chunks), error=error)
    made.prompt_tokens = 10
    made.output_tokens = len(chunks) if tokens is None else tokens
    made.finished = chunks[-1] if chunks else sent
    return made


def test_each_latency_of_one_request() -> None:
    one = record(1.5, 1.6, 1.9, 2.0, sent=1.0)
    assert one.ttft == pytest.approx(0.5)
    assert one.ttst == pytest.approx(0.6)
    assert one.e2e == pytest.approx(1.0)
    assert one.tpot == pytest.approx(0.5 / 3)
    assert one.gaps == pytest.approx([0.1, 0.3, 0.1])


def test_tpot_divides_by_tokens_not_by_chunks() -> None:
    assert record(1.0, 2.0, tokens=11).tpot == pytest.approx(0.1)


def test_one_token_has_no_time_per_token_and_no_second_token() -> None:
    one = record(1.0)
    assert (one.tpot, one.ttst, one.gaps) == (None, None, [])
    assert summarize([one]).tpot is None


def test_late_sends_count_against_the_time_from_the_due_time() -> None:
    summary = summarize([record(3.5, sent=3.0, due=1.0), record(1.5, sent=1.0, due=1.0)])
    assert summary.ttft is not None
    assert summary.ttft.max == pytest.approx(500)
    assert summary.ttft_due is not None
    assert summary.ttft_due.max == pytest.approx(2500)
    assert summary.late is not None
    assert summary.late.max == pytest.approx(2000)


def test_a_closed_loop_has_no_due_times() -> None:
    summary = summarize([record(1.0)])
    assert summary.late is None
    assert summary.ttft_due is None


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=60), st.sampled_from([0, 50, 90, 99, 100]))
def test_percentiles_are_numpys(values: list[float], q: float) -> None:
    assert percentile(sorted(values), q) == pytest.approx(float(np.percentile(values, q)), abs=1e-6)


def test_a_missing_value_is_not_a_zero() -> None:
    assert Stats.of([None, 0.002, None]) == Stats(1, 2.0, 2.0, 2.0, 2.0, 2.0)
    assert Stats.of([None]) is None


def test_totals_divide_by_the_time_from_first_send_to_last_arrival() -> None:
    summary = summarize([record(2.0, 3.0, sent=1.0), record(4.0, 5.0, sent=2.0)])
    assert summary.seconds == pytest.approx(4.0)
    assert summary.output_tok_per_s == pytest.approx(1.0)
    assert summary.input_tok_per_s == pytest.approx(5.0)
    assert summary.requests_per_s == pytest.approx(0.5)


def test_failed_requests_are_counted_by_kind_and_kept_out_of_latencies() -> None:
    records = [record(1.0, 2.0), record(9.0, error="timeout"), record(error="http_503"), record(error="http_503")]
    summary = summarize(records)
    assert (summary.sent, summary.completed, summary.failed) == (4, 1, 3)
    assert summary.errors == {"http_503": 2, "timeout": 1}
    assert summary.ttft is not None
    assert summary.ttft.count == 1
    assert summary.output_tokens == 2
    assert summary.seconds == pytest.approx(9.0)


def test_interrupted_requests_are_neither_completed_nor_failed() -> None:
    summary = summarize([record(1.0), record(error=INTERRUPTED)], Objectives(ttft=2000))
    assert (summary.completed, summary.failed, summary.interrupted) == (1, 0, 1)
    assert summary.attainment == 1.0


def test_goodput_needs_every_objective_and_failures_count_against_attainment() -> None:
    good = record(0.1, 0.2, 0.3)
    slow_start = record(0.9, 1.0, 1.1)
    stutter = record(0.1, 0.101, 0.3)
    records = [good, slow_start, stutter, record(error="timeout")]
    summary = summarize(records, Objectives(ttft=500, tpot=150, itl=150))
    assert summary.attainment == pytest.approx(1 / 4)
    assert summary.goodput_per_s == pytest.approx(1 / summary.seconds)
    assert summarize(records).goodput_per_s is None


def test_waiting_in_front_of_the_door_misses_the_objective() -> None:
    assert not Objectives(ttft=500).met(record(2.1, sent=2.0, due=0.0))


def test_no_records_are_no_crash() -> None:
    summary = summarize([])
    assert (summary.sent, summary.requests_per_s, summary.ttft) == (0, 0.0, None)
