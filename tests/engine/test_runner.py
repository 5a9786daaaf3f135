"""The runner's own promises: batch order, prompt logprobs over chunks, rows independent of their batch."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest
import torch
from transformers import AutoModelForCausalLM

from baton.base.config import EngineConfig
from baton.base.messages import Generate
from baton.engine.load import Built, build_runner
from baton.engine.sequence import Sequence
from baton.engine.sockets import Slice

from .drive import drive, engine_of, request, texts
from .models import make

PROMPT = [random.Random(3).randrange(3, 199) for _ in range(45)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def built(path: Path) -> Built:
    return build_runner(EngineConfig(model=str(path), kv_pages=32, threads=1))


@pytest.fixture(scope="module")
def reference(path: Path) -> torch.Tensor:
    """log p(token | before) of PROMPT's tokens 1.. by Transformers."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    logprobs = model(torch.tensor([PROMPT])).logits[0, :-1].log_softmax(-1)
    return logprobs.gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0].detach()


@pytest.mark.parametrize("chunk", [1, 7, 44, 45, 512])
def test_prompt_logprobs_over_any_chunks(built: Built, reference: torch.Tensor, chunk: int) -> None:
    heard = drive(engine_of(built, chunk=chunk), [request("a", PROMPT, 2, prompt_logprobs=2)])["a"]
    told = heard[0].prompt_logprobs
    assert [entry.token for entry in told] == PROMPT[1:]
    torch.testing.assert_close(torch.tensor([entry.logprob for entry in told]), reference, atol=1e-4, rtol=1e-4)
    assert all(len(entry.top) == 2 and entry.top[0][0] >= (entry.logprob or 0.0) - 1e-4 for entry in told)


@pytest.mark.parametrize("start", [0, 10, 44, 45])
def test_prompt_logprobs_from_a_position_on(built: Built, reference: torch.Tensor, start: int) -> None:
    sent = request("a", PROMPT, 1, prompt_logprobs=0, prompt_logprobs_start=start)
    told = drive(engine_of(built, chunk=7), [sent])["a"][0].prompt_logprobs
    assert [entry.token for entry in told] == PROMPT[start + 1 :]
    expected = reference[start:]
    torch.testing.assert_close(torch.tensor([entry.logprob for entry in told]), expected, atol=1e-4, rtol=1e-4)


def test_seeded_answers_do_not_depend_on_the_batch(built: Built) -> None:
    wanted = request("a", PROMPT, 20, temperature=0.9, seed=11)
    alone = texts(drive(engine_of(built), [wanted]))["a"]
    others = [request(str(seed), PROMPT[seed:], 25, temperature=1.3, seed=seed) for seed in range(1, 6)]
    assert texts(drive(engine_of(built, chunk=5), [*others[:3], wanted, *others[3:]]))["a"] == alone
    assert texts(drive(engine_of(built, pages=9), [*others[:3], wanted, *others[3:]]))["a"] == alone


def test_two_threads_say_the_same_as_one(path: Path, built: Built) -> None:
    both = build_runner(EngineConfig(model=str(path), kv_pages=32, threads=2))
    try:
        sent = [request(str(index), PROMPT[index:], 20) for index in range(4)]
        assert texts(drive(engine_of(both), sent)) == texts(drive(engine_of(built), sent))
    finally:
        torch.set_num_threads(1)


def test_forgetting_is_idempotent(built: Built) -> None:
    sequence = Sequence.of(Generate("never seen", (1,), request("a", [1], 1).sampling), 0.0)
    built.runner.forget(sequence)
    built.runner.forget(sequence)


@pytest.mark.parametrize("chunk", [1, 2, 7, 44, 512])
@pytest.mark.parametrize("others", [0, 5])
def test_neither_chunks_nor_others_move_a_single_bit(built: Built, chunk: int, others: int) -> None:
    """float32 on the CPU: logprobs, not only tokens, are those of a sequence that was alone and computed at once."""

    def logprobs(chunk: int, others: int) -> list[float]:
        draw = random.Random(5)
        company = [[draw.randrange(3, 199) for _ in range(draw.randrange(2, 60))] for _ in range(others)]
        requests = [request("one", PROMPT, 12, logprobs=0, prompt_logprobs=0)]
        requests += [request(str(index), prompt, 20) for index, prompt in enumerate(company)]
        heard = drive(engine_of(built, chunk=chunk, pages=32, prefix_caching=False), requests)["one"]
        return [one.logprob for m in heard for one in (*m.prompt_logprobs, *m.logprobs)]

    assert len(logprobs(chunk, others)) == len(PROMPT) - 1 + 12
    assert logprobs(chunk, others) == logprobs(512, 0)


@pytest.mark.parametrize("resumed", [1, 2, 7, 19])
@pytest.mark.parametrize("chunk", [5, 512])
def test_going_on_elsewhere_moves_no_bit(built: Built, resumed: int, chunk: int) -> None:
    """An answer's tokens that come with the request are computed as decode steps are: what follows is the same."""
    sampling: dict[str, object] = {"temperature": 0.9, "seed": 4, "logprobs": 2, "repetition_penalty": 1.2}
    whole = drive(engine_of(built, prefix_caching=False), [request("a", PROMPT, 20, **sampling)])["a"]
    tokens = [token for message in whole for token in message.tokens]
    again = request("a", [*PROMPT, *tokens[:resumed]], 20, **sampling)
    again = msgspec.structs.replace(again, resumed=resumed)
    rest = drive(engine_of(built, chunk=chunk, prefix_caching=False), [again])["a"]
    assert [(m.tokens, m.logprobs, m.finish) for m in rest] == [
        (m.tokens, m.logprobs, m.finish) for m in whole[resumed:]
    ]
    assert rest[-1].usage is not None
    assert (rest[-1].usage.prompt_tokens, rest[-1].usage.completion_tokens) == (len(PROMPT), 20)


def test_preemption_moves_no_bit(built: Built) -> None:
    requests = [request(str(index), PROMPT[index:], 25, logprobs=0) for index in range(6)]
    roomy, tight = engine_of(built, prefix_caching=False), engine_of(built, pages=7, prefix_caching=False)
    wanted, heard = drive(roomy, requests), drive(tight, requests)
    assert tight.scheduler.retractions > roomy.scheduler.retractions == 0
    for id, messages in wanted.items():
        assert [m.logprobs for m in heard[id]] == [m.logprobs for m in messages]


def test_logprobs_of_a_prompt_that_is_computed_again_with_its_answer(built: Built) -> None:
    """One slice with both: the prompt's logprobs are the prompt's only, and the token is the answer's next."""
    sequence = Sequence.of(request("a", [*PROMPT, 9, 8], 20, prompt_logprobs=0), 0.0)
    sequence.prompt_len = len(PROMPT)
    sequence.pages = list(range(8))
    (result,) = built.runner.run([Slice(sequence, 0, len(PROMPT) + 2, True)])
    assert [entry.token for entry in result.prompt_logprobs] == PROMPT[1:]
    assert result.token is not None
