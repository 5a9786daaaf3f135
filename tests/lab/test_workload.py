"""The workload is a pure function: what is sent and when, the same for the same seed."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.base.errors import ConfigError
from baton.lab.config import BenchConfig
from baton.lab.traces import TRACES, load_trace
from baton.lab.workload import Lengths, plan, warmup


def test_the_same_seed_gives_the_same_load_and_another_seed_another() -> None:
    config = BenchConfig(requests=30, rate="5", input_len="8-64", output_len="16~4", seed=7)
    assert plan(config) == plan(config)
    assert plan(config) != plan(replace(config, seed=8))


def test_another_rate_leaves_the_prompts_as_they_are() -> None:
    slow = plan(BenchConfig(requests=30, rate="1", input_len="8-64"))
    fast = plan(BenchConfig(requests=30, rate="10", input_len="8-64"))
    assert [(job.prompt, job.output_len) for job in slow] == [(job.prompt, job.output_len) for job in fast]
    assert [job.due for job in fast] == pytest.approx([(job.due or 0) / 10 for job in slow])


def test_poisson_gaps_have_the_mean_and_the_spread_of_an_exponential() -> None:
    dues = [job.due or 0.0 for job in plan(BenchConfig(requests=4000, rate="20", input_len="1", output_len="1"))]
    gaps = [after - before for before, after in pairwise(dues)]
    mean = sum(gaps) / len(gaps)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert dues[0] == 0.0
    assert mean == pytest.approx(0.05, rel=0.1)
    assert deviation == pytest.approx(0.05, rel=0.1)


def test_fixed_arrivals_are_evenly_apart_and_inf_has_no_times() -> None:
    fixed = plan(BenchConfig(requests=5, rate="4", arrivals="fixed"))
    assert [job.due for job in fixed] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert [job.due for job in plan(BenchConfig(requests=3))] == [None, None, None]


def test_duration_cuts_what_is_due_later() -> None:
    assert len(plan(BenchConfig(requests=100, rate="10", arrivals="fixed", duration=1.0))) == 11


@given(low=st.integers(1, 50), extra=st.integers(0, 50), seed=st.integers(0, 1000))
def test_uniform_lengths_stay_in_their_range(low: int, extra: int, seed: int) -> None:
    jobs = plan(BenchConfig(requests=20, input_len=f"{low}-{low + extra}", output_len=str(low), seed=seed))
    assert all(low <= len(job.prompt) <= low + extra and job.output_len == low for job in jobs)


def test_normal_lengths_never_fall_below_one() -> None:
    assert min(len(job.prompt) for job in plan(BenchConfig(requests=200, input_len="2~20"))) == 1


@pytest.mark.parametrize("text", ["", "a", "0", "9-3", "-4", "1-2-3", "1.5"])
def test_lengths_that_make_no_sense_are_refused_with_the_spellings_that_do(text: str) -> None:
    with pytest.raises(ConfigError, match="input_len"):
        Lengths.parse("input_len", text)


@pytest.mark.parametrize(
    "wrong",
    [{"rate": "0"}, {"rate": "fast"}, {"rate": "trace"}, {"requests": 0}, {"shared_prefix": 1.5}, {"endpoint": "x"}],
)
def test_a_wrong_option_is_named(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        BenchConfig(**wrong)


def test_shared_prefixes_are_shared_in_groups_and_nothing_else_is() -> None:
    config = BenchConfig(requests=8, input_len="40", shared_prefix=0.5, prefix_groups=2)
    prompts = [job.prompt for job in plan(config)]
    assert len({prompt[:20] for prompt in prompts}) == 2
    assert prompts[0][:20] == prompts[2][:20] != prompts[1][:20]
    assert len({prompt[20:] for prompt in prompts}) == 8


def test_tokens_stay_below_the_vocabulary() -> None:
    assert max(max(job.prompt) for job in plan(BenchConfig(requests=5, input_len="200", vocab=50))) < 50


def test_warmup_has_the_shapes_but_not_the_words_of_the_measured_requests() -> None:
    config = BenchConfig(requests=3, input_len="8-64", warmup=2)
    jobs, first = plan(config), warmup(config)
    assert [(len(job.prompt), job.output_len) for job in first] == [
        (len(job.prompt), job.output_len) for job in jobs[:2]
    ]
    assert not {job.prompt for job in first} & {job.prompt for job in jobs}


@pytest.mark.parametrize("name", sorted(TRACES))
def test_the_traces_that_come_along_can_be_read_and_are_in_order(name: str) -> None:
    rows = load_trace(name)
    assert len(rows) >= 499
    assert [row.arrived_at for row in rows] == sorted(row.arrived_at for row in rows)
    assert all(row.input_len >= 1 and row.output_len >= 0 for row in rows)


def test_a_trace_is_replayed_at_its_own_times_scaled() -> None:
    config = BenchConfig(
        dataset="azure-conversation", requests=50, rate="trace", trace_speed=2.0, length_scale=0.1, max_output_len=9
    )
    rows, jobs = load_trace("azure-conversation"), plan(config)
    for row, job in zip(rows, jobs, strict=False):
        assert job.due == pytest.approx((row.arrived_at - rows[0].arrived_at) / 2)
        assert len(job.prompt) == max(1, round(row.input_len / 10))
        assert job.output_len == min(9, max(1, round(row.output_len / 10)))


def test_mooncake_blocks_repeat_as_recorded() -> None:
    config = BenchConfig(dataset="mooncake-conversation", requests=60, length_scale=1 / 16)
    rows, jobs = load_trace("mooncake-conversation"), plan(config)
    for row, job in zip(rows, jobs, strict=False):
        assert len(job.prompt) == round(row.input_len / 16)
        for other_row, other in zip(rows[: job.index], jobs[: job.index], strict=True):
            equal_blocks = [a == b for a, b in zip(row.blocks, other_row.blocks, strict=False)]
            shared = equal_blocks.index(False) if False in equal_blocks else len(equal_blocks)
            shared = min(shared * 32, len(job.prompt), len(other.prompt))
            assert job.prompt[:shared] == other.prompt[:shared]
            if shared < min(len(job.prompt), len(other.prompt)):
                assert job.prompt[: shared + 32] != other.prompt[: shared + 32]


def test_azures_own_format_is_read(tmp_path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,4808,10\n"
        "2023-11-16 18:17:04.0319600,3180,8\n"
    )
    jobs = plan(BenchConfig(dataset=str(path), rate="trace"))
    assert [len(job.prompt) for job in jobs] == [4808, 3180]
    assert jobs[1].due == pytest.approx(0.052, abs=1e-5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n", "first line"),
        ("arrived_at,num_prefill_tokens,num_decode_tokens\n0,many,3\n", "line 2"),
        ("arrived_at,num_prefill_tokens,num_decode_tokens\n0,1\n", "line 2"),
        ('{"timestamp": 0, "input_length": 1, "output_length": 1}\n{"timestamp": 0}\n', "line 2"),
        ("arrived_at,num_prefill_tokens,num_decode_tokens\n", "no rows"),
        ("", "first line"),
    ],
)
def test_a_broken_trace_is_refused_with_its_line(tmp_path, content: str, message: str) -> None:
    path = tmp_path / "trace"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_trace(str(path))


def test_an_unknown_dataset_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match='did you mean "azure-code"'):
        load_trace("azure-cod")


def test_prompts_of_another_length_do_not_begin_alike() -> None:
    """Two loads with one seed, one after the other: the second finds nothing in a prefix cache."""
    long, short = (plan(BenchConfig(input_len=length, requests=24)) for length in ("512", "128"))
    beginnings = {job.prompt[at : at + 16] for job in long for at in range(0, 512, 16)}
    assert not any(job.prompt[:16] in beginnings for job in short)
