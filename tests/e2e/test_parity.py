"""Prefill and decode apart give exactly the undivided engine's answers, and greedy ones are Transformers' own."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from baton.base.config import EngineConfig
from baton.base.messages import Grammar, Sampling
from tests.e2e.nodes import Answer, Pair, Whole, config, pair, whole

LENGTHS = (1, 2, 7, 8, 9, 15, 16, 17, 24, 25, 48, 61, 96)
"""Around the page size (8), the chunk size (24) and multiples of both."""

SAMPLINGS = {
    "greedy": Sampling(max_tokens=12, temperature=0.0),
    "one token": Sampling(max_tokens=1, temperature=0.0),
    "two tokens": Sampling(max_tokens=2, temperature=0.0),
    "seeded": Sampling(max_tokens=12, seed=11, temperature=0.9),
    "nucleus": Sampling(max_tokens=12, seed=12, temperature=1.1, top_p=0.8, top_k=20, min_p=0.01),
    "penalties": Sampling(
        max_tokens=12, temperature=0.0, presence_penalty=0.5, frequency_penalty=0.4, repetition_penalty=1.3
    ),
    "biased": Sampling(max_tokens=12, temperature=0.0, logit_bias=((5, 3.0), (9, -100.0)), min_tokens=4),
    "logprobs": Sampling(max_tokens=6, seed=3, temperature=0.7, logprobs=4, ignore_eos=True),
    "regex": Sampling(max_tokens=12, seed=4, temperature=1.0, grammar=Grammar("regex", "[0-9]{2,6}")),
}


@pytest.fixture(scope="module")
def engine(tiny_model_dir: Path) -> EngineConfig:
    return config(tiny_model_dir)


@pytest.fixture(scope="module")
def undivided(engine: EngineConfig) -> Iterator[Whole]:
    with whole(engine) as stack:
        yield stack


@pytest.fixture(scope="module", params=["shm", "tcp"])
def divided(request: pytest.FixtureRequest, engine: EngineConfig) -> Iterator[Pair]:
    with pair(engine, request.param) as stack:
        yield stack


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(f"{length} {seed}").choices(range(10, 200), k=length)


def same(ours: dict[str, Answer], theirs: dict[str, Answer]) -> None:
    for id in theirs:
        assert ours[id].error is None
        assert ours[id].tokens == theirs[id].tokens, id
        assert ours[id].reason == theirs[id].reason, id
        assert [t for t, _ in ours[id].logprobs] == [t for t, _ in theirs[id].logprobs], id
        assert [p for _, p in ours[id].logprobs] == [p for _, p in theirs[id].logprobs], id  # to the last bit


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_one_at_a_time(divided: Pair, undivided: Whole, sampling: Sampling) -> None:
    for length in LENGTHS:
        requests = [(f"{sampling} {length}", prompt(length), sampling)]
        same(divided.run(requests), undivided.run(requests))
    divided.assert_clean()
    undivided.assert_clean()


def test_many_at_once(divided: Pair, undivided: Whole) -> None:
    requests = [
        (f"many {name} {length}", prompt(length, 1), sampling)
        for name, sampling in SAMPLINGS.items()
        for length in (3, 16, 40)
    ]
    same(divided.run(requests), undivided.run(requests))
    divided.assert_clean()


def test_prefix_hits_on_either_side(divided: Pair, undivided: Whole) -> None:
    sampling = SAMPLINGS["greedy"]
    shared = prompt(40, 2)
    requests = [(f"prefix {n}", shared[:n] + prompt(extra, n), sampling) for n in (8, 24, 40) for extra in (1, 8, 11)]
    for request in requests * 2:  # one after the other: later ones find the earlier ones' pages
        again = [(request[0], request[1], sampling)]
        same(divided.run(again), undivided.run(again))
    assert divided.decode.answers["prefix 40"].cached_tokens >= 40
    divided.assert_clean()


def test_samples_of_one_prompt_share_its_pages(divided: Pair, undivided: Whole) -> None:
    requests = [(f"n {i}", prompt(30, 3), Sampling(max_tokens=8, seed=100 + i, temperature=1.0)) for i in range(3)]
    ours = divided.run(requests)
    same(ours, undivided.run(requests))
    assert len({tuple(answer.tokens) for answer in ours.values()}) > 1
    divided.assert_clean()


def test_few_pages_preemption_on_decode(engine: EngineConfig, undivided: Whole) -> None:
    """D runs out of pages while decoding, recomputes by itself, and still says the same."""
    from dataclasses import replace

    requests = [(f"few {i}", prompt(20, i), Sampling(max_tokens=40, seed=i, temperature=0.8)) for i in range(6)]
    with pair(engine, "shm", replace(engine, kv_pages=24, max_model_len=192)) as stack:
        ours = stack.run(requests)
        assert stack.decode.assembly.engine.scheduler.retractions > 0
        stack.assert_clean()
    same(ours, undivided.run(requests))


def test_a_request_without_a_room_is_served_whole_by_decode(divided: Pair, undivided: Whole) -> None:
    from baton.base.messages import Generate
    from tests.e2e.nodes import drive

    divided.decode.submit(Generate("roomless", tuple(prompt(33)), SAMPLINGS["greedy"]))
    drive(divided.decode)
    whole_answer = undivided.run([("roomless", prompt(33), SAMPLINGS["greedy"])])
    assert divided.decode.answers["roomless"].tokens == whole_answer["roomless"].tokens


def test_prompt_logprobs_come_from_prefill(divided: Pair, undivided: Whole) -> None:
    sampling = Sampling(max_tokens=2, temperature=0.0, logprobs=0, prompt_logprobs=0)
    divided.run([("scored", prompt(30), sampling)])
    theirs = undivided.run([("scored", prompt(30), sampling)])["scored"].prompt_logprobs
    ours = divided.prefill.answers["scored"].prompt_logprobs
    assert ours == theirs  # to the last bit


def test_greedy_is_what_transformers_generates(divided: Pair, tiny_model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    for length in LENGTHS:
        inputs = torch.tensor([prompt(length, 4)])
        with torch.inference_mode():
            output = model.generate(
                inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=10, do_sample=False, pad_token_id=0
            )
        expected = output[0, length:].tolist()
        answer = divided.run([(f"hf {length}", prompt(length, 4), Sampling(max_tokens=10, temperature=0.0))])
        assert answer[f"hf {length}"].tokens == expected
    divided.assert_clean()
