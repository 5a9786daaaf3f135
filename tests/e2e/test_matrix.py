"""P/D = unified = `transformers.generate`, for every kind of request, over HTTP.

    {shm, tcp} x {/generate, completions, chat} x {streamed, whole} x {1, 2, many at once}
               x {what is asked for} x {the prompt's shape} x {cold, found in the prefix cache}

The unified stack answers every question of one endpoint once, whole; greedy answers are compared with Transformers,
structured ones with what they must match. Every other way of asking must give the same answer.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from tests.e2e.asking import ENDPOINTS, Answer, Ask, ask_all, cut_at, unlike
from tests.e2e.stacks import Stack, client

MANY = 32
PAGE = 8
"""As in `stacks.SMALL`."""
SHAPES = {"whole pages": 24, "ragged": 29, "one chunk": 32, "one chunk and one": 33, "two chunks": 64, "extended": 73}
"""Tokens of the prompt. `extended` begins with `two chunks` (in a chat up to the end of the message)."""
LETTERS = "CFGHIJKLMNOPQRUWXY"
"""Each is one token of the tiny model, whatever stands beside it."""
SCHEMA = {
    "type": "object",
    "properties": {"yes": {"type": "boolean"}, "n": {"enum": [1, 22, 333]}},
    "required": ["yes", "n"],
    "additionalProperties": False,
}
GRAMMARS = {
    "regex": (r"[1-9][0-9]{0,3}(, [A-F]{2}){1,2}", r"[1-9][0-9]{0,3}(, [A-F]{2}){1,2}"),
    "json_schema": (json.dumps(SCHEMA), r'\{\s*"yes"\s*:\s*(true|false)\s*,\s*"n"\s*:\s*(1|22|333)\s*\}'),
    "ebnf": ('root ::= way ", " way ";"\nway ::= "up" | "down" | "left"', "(up|down|left), (up|down|left);"),
}
"""Kind: (source, what a complete answer looks like)."""

WANTS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "one token": {"max_tokens": 1},
    "logprobs": {"top_logprobs": 4},
    "stop": {"stop": ("is never said",)},  # and a piece of the greedy answer, see `Questions`
    "seeded": {"temperature": 0.9, "seed": 11},
    "n=3": {"temperature": 1.0, "seed": 5, "n": 3},
    "all of it": {"temperature": 0.8, "seed": 3, "n": 3, "top_logprobs": 2, "stop": ("e", "1", "or")},
    **{
        kind: {"temperature": 1.0, "seed": 2, "max_tokens": 160, "grammar": (kind, source)}
        for kind, (source, _) in GRAMMARS.items()
    },
}
GREEDY = ("greedy", "one token", "logprobs", "stop")
EVERY = [(want, shape) for want in WANTS for shape in SHAPES]
FEW = [(want, list(SHAPES)[at % len(SHAPES)]) for at, want in enumerate(WANTS)]
"""Every want and every shape, though not every pair of them."""

Key = tuple[str, str]


class Questions:
    """All questions, and what Transformers says to the greedy ones."""

    def __init__(self, directory: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self._model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        self._said: dict[str, tuple[list[int], list[float]]] = {}

    def prompt(self, endpoint: str, shape: str) -> str:
        """As many tokens as the shape says, the chat template's included."""
        base = "two chunks" if shape == "extended" else shape
        letters = random.Random(base).choices(LETTERS, k=SHAPES[base] - len(self.encode(endpoint, "")))
        return "".join(letters) + LETTERS[: SHAPES[shape] - SHAPES[base]]

    def encode(self, endpoint: str, prompt: str) -> list[int]:
        if endpoint == "chat":
            prompt = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        return list(self._tokenizer.encode(prompt, add_special_tokens=False).ids)

    def ask(self, endpoint: str, want: str, shape: str, salt: str) -> Ask:
        ask = Ask(self.prompt(endpoint, shape), salt=salt, **WANTS[want])
        if want != "stop":
            return ask
        text, _, _ = self.transformers(endpoint, shape, 12)
        piece = re.search(r"[ -~]{2}", text[1:])  # two plain characters, not the first
        return replace(ask, stop=(*ask.stop, piece[0] if piece else text[2]))

    def transformers(self, endpoint: str, shape: str, max_tokens: int) -> tuple[str, int, list[float]]:
        """The greedy answer: text, tokens, logprobs."""
        prompt = self.prompt(endpoint, shape)
        if prompt + endpoint not in self._said:
            inputs = torch.tensor([self.encode(endpoint, prompt)])
            with torch.inference_mode():
                out = self._model.generate(
                    inputs,
                    attention_mask=torch.ones_like(inputs),
                    max_new_tokens=12,
                    do_sample=False,
                    return_dict_in_generate=True,
                    output_logits=True,
                )
            tokens = out.sequences[0, inputs.shape[1] :].tolist()
            rows = [logits[0].log_softmax(-1) for logits in out.logits]
            self._said[prompt + endpoint] = tokens, [float(row[t]) for row, t in zip(rows, tokens, strict=True)]
        tokens, logprobs = self._said[prompt + endpoint]
        text = self._tokenizer.decode(tokens[:max_tokens], skip_special_tokens=True)
        return text, len(tokens[:max_tokens]), logprobs[:max_tokens]

    def put(
        self, url: str, endpoint: str, stream: bool, keys: Iterable[Key], salt: str, at_once: int
    ) -> dict[Key, Answer]:
        """`salt`: only questions about the same thing, with the same salt, find each other's pages."""
        asks = {
            (want, shape): (endpoint, self.ask(endpoint, want, shape, f"{salt} {want}"), stream) for want, shape in keys
        }
        return ask_all(url, asks, at_once=at_once)


@pytest.fixture(scope="module")
def questions(tiny_model_dir: Path) -> Questions:
    return Questions(tiny_model_dir)


@pytest.fixture(scope="module")
def expected(unified: Stack, questions: Questions) -> dict[str, dict[Key, Answer]]:
    return {name: questions.put(unified.url, name, False, EVERY, "expected", MANY) for name in ENDPOINTS}


Expected = dict[str, dict[Key, Answer]]
endpoints = pytest.mark.parametrize("endpoint", ENDPOINTS)
both_ways = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


@endpoints
@pytest.mark.parametrize("shape", SHAPES)
def test_unified_says_what_transformers_says(
    expected: Expected, questions: Questions, endpoint: str, shape: str
) -> None:
    for want in GREEDY:
        ask, answer = questions.ask(endpoint, want, shape, ""), expected[endpoint][want, shape]
        text, tokens, logprobs = questions.transformers(endpoint, shape, ask.max_tokens)
        (said,) = answer.said
        assert said.text == cut_at(text, ask.stop)
        assert answer.prompt_tokens == SHAPES[shape]
        if want == "stop":
            assert (said.finish, said.matched) == ("stop", ask.stop[-1])
            assert len(said.text) < len(text)
        else:
            assert answer.completion_tokens == tokens
        if want == "logprobs":
            assert said.logprobs == pytest.approx(logprobs, abs=1e-3)
            assert all(
                len(row) == 4 and max(row.values()) == pytest.approx(p, abs=1e-3)
                for row, p in zip(said.tops, said.logprobs)
            )


@endpoints
@pytest.mark.parametrize("kind", GRAMMARS)
def test_structured_answers_are_structured(expected: Expected, endpoint: str, kind: str) -> None:
    for shape in SHAPES:
        (said,) = expected[endpoint][kind, shape].said
        assert said.finish == "stop"
        assert re.fullmatch(GRAMMARS[kind][1], said.text), said


def test_three_samples_are_three(expected: Expected) -> None:
    for answers in expected.values():
        for (want, _), answer in answers.items():
            texts = {said.text for said in answer.said}
            assert len(texts) == (3 if want == "n=3" else len(texts))


def test_endpoints_agree(expected: Expected) -> None:
    """The same prompt and seed give the same answer under every name."""

    def plain(answer: Answer) -> Answer:
        return replace(answer, said=[replace(said, tops=[]) for said in answer.said])

    theirs = expected["completions"]
    ours = {key: plain(answer) for key, answer in expected["generate"].items()}
    assert not unlike(ours, lambda key: plain(theirs[key]))


@endpoints
def test_unified_streams_what_it_says(unified: Stack, expected: Expected, questions: Questions, endpoint: str) -> None:
    answers = questions.put(unified.url, endpoint, True, FEW, "streamed", MANY)
    assert not unlike(answers, expected[endpoint].__getitem__)


@endpoints
@both_ways
@pytest.mark.parametrize("at_once", [1, 2])
def test_prefill_and_decode_apart_cold_and_with_prefix_hits(
    pd: Stack, expected: Expected, questions: Questions, endpoint: str, stream: bool, at_once: int
) -> None:
    salt = f"{endpoint} {stream} {at_once}"
    for found in (False, True):
        answers = questions.put(pd.url, endpoint, stream, FEW, salt, at_once)
        assert not unlike(answers, expected[endpoint].__getitem__)
        for key, answer in answers.items():
            whole_pages = (answer.prompt_tokens - 1) // PAGE * PAGE  # the last token is always computed
            assert answer.cached_tokens == (whole_pages if found else 0), key


@endpoints
@both_ways
def test_prefill_and_decode_apart_many_at_once(
    pd: Stack, expected: Expected, questions: Questions, endpoint: str, stream: bool
) -> None:
    answers = questions.put(pd.url, endpoint, stream, EVERY, f"many {endpoint} {stream}", MANY)
    assert not unlike(answers, expected[endpoint].__getitem__)


@endpoints
@both_ways
@pytest.mark.parametrize("pd", ["shm"], indirect=True)
def test_a_decode_worker_serves_whole_what_has_no_room(
    pd: Stack, expected: Expected, questions: Questions, endpoint: str, stream: bool
) -> None:
    decode = pd.worker("decode")
    before = handed_over(decode)
    answers = questions.put(decode, endpoint, stream, FEW, f"roomless {endpoint} {stream}", MANY)
    assert not unlike(answers, expected[endpoint].__getitem__)
    assert handed_over(decode) == before


def handed_over(worker: str) -> int:
    with client(worker) as http:
        return int(http.get("/v1/loads").json()["loads"][0]["disaggregation"]["handoffs_done"])
