"""Every model family, token for token as Transformers says it: chunks, concurrency, prefix hits, preemption."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from baton.base.config import EngineConfig
from baton.base.messages import Generate
from baton.engine.load import Built, build_runner

from .drive import drive, engine_of, request, texts
from .models import FAMILIES, generate, make

PROMPT_LENS = (1, 5, 23, 40)
OUTPUT = 24


@dataclass(frozen=True)
class Case:
    built: Built
    prompts: list[list[int]]
    answers: list[list[int]]


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(request.param, tmp_path_factory.mktemp("models"))


def make_case(family: str, directory: Path) -> Case:
    path = make(family, directory)
    draw = random.Random(family)
    prompts = [[draw.randrange(3, 199) for _ in range(length)] for length in PROMPT_LENS]
    prompts.append([*prompts[-1][:32], 5, 6, 7])  # a prefix of two pages in common
    built = build_runner(EngineConfig(model=str(path), page_size=16, kv_pages=32, threads=1))
    return Case(built, prompts, [generate(path, prompt, OUTPUT) for prompt in prompts])


def requests_of(case: Case) -> list[Generate]:
    return [request(str(index), prompt, OUTPUT) for index, prompt in enumerate(case.prompts)]


def expected(case: Case) -> dict[str, list[int]]:
    return {str(index): answer for index, answer in enumerate(case.answers)}


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_concurrent_sequences_equal_generate(case: Case, chunk: int) -> None:
    assert texts(drive(engine_of(case.built, chunk=chunk), requests_of(case))) == expected(case)


def test_one_after_another_with_prefix_hits_equal_generate(case: Case) -> None:
    engine = engine_of(case.built)
    for _ in range(2):
        for one in requests_of(case):
            assert texts(drive(engine, [one]))[one.id] == expected(case)[one.id]
    assert engine.load().cached_tokens > 0


def test_preempted_sequences_equal_generate(case: Case) -> None:
    engine = engine_of(case.built, pages=10)
    assert texts(drive(engine, requests_of(case))) == expected(case)
    assert engine.scheduler.retractions > 0


def test_answers_are_not_all_alike(case: Case) -> None:
    """The comparison means something: these tiny models do not repeat one token."""
    assert len({token for answer in case.answers for token in answer}) > 10
