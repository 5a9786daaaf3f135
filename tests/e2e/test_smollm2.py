"""The real model, end to end over HTTP: sensible, and the same whether or not prefill and decode are apart."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.asking import ENDPOINTS, Ask, ask_all, unlike
from tests.e2e.stacks import PD, Stack, serve
from tests.markdown import blocks, shell_lines

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]  # two engines and Transformers may share two busy cores
README = Path(__file__).parents[2] / "README.md"

QUESTIONS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "List three colours. " * 30,  # longer than a chunk
)


@pytest.fixture(scope="module")
def stack(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with serve(smollm2, PD, tmp_path_factory.mktemp("real"), "--chunked-prefill-size", "128") as s:
        yield s


@pytest.fixture
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_smollm2_says_what_transformers_says(client: openai.OpenAI, smollm2: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    name = client.models.list().data[0].id
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        answer = client.chat.completions.create(
            model=name,
            messages=messages,  # type: ignore[arg-type]
            max_tokens=24,
            temperature=0,
        )
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        prompt_len = inputs["input_ids"].shape[1]
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == prompt_len
        expected = tokenizer.decode(output[0, prompt_len:], skip_special_tokens=True)
        assert answer.choices[0].message.content == expected
    paris = client.chat.completions.create(
        model=name, messages=[{"role": "user", "content": QUESTIONS[0]}], max_tokens=24, temperature=0
    )
    assert "Paris" in (paris.choices[0].message.content or "")


SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "rank": {"enum": [1, 2, 3]}},
    "required": ["city", "rank"],
    "additionalProperties": False,
}
WANTS = {
    "greedy": Ask(QUESTIONS[0], max_tokens=16, top_logprobs=3),
    "one token, long": Ask(QUESTIONS[2], max_tokens=1),
    "stop": Ask(QUESTIONS[0], max_tokens=24, stop=("Paris", "France")),
    "three": Ask(QUESTIONS[1], max_tokens=12, temperature=0.9, seed=4, n=3),
    "schema": Ask(QUESTIONS[0], max_tokens=60, temperature=0.7, seed=5, grammar=("json_schema", json.dumps(SCHEMA))),
}


def test_prefill_and_decode_apart_are_one(stack: Stack) -> None:
    """The decode worker alone, asked without a room, is an undivided engine with the same weights."""
    asks = {(endpoint, want): (endpoint, ask) for endpoint in ENDPOINTS for want, ask in WANTS.items()}
    mixed = {key: (*asked, at % 2 == 0) for at, (key, asked) in enumerate(asks.items())}
    ours = ask_all(stack.url, mixed, at_once=8)
    theirs = ask_all(stack.worker("decode"), {key: (*asked, False) for key, asked in asks.items()}, at_once=8)
    assert not unlike(ours, theirs.__getitem__)
    for endpoint in ENDPOINTS:
        assert set(json.loads(ours[endpoint, "schema"].said[0].text)) == {"city", "rank"}
    stack.assert_clean()


def test_the_readme_blocks_run(stack: Stack) -> None:
    """The curl line and the Python code, as they stand there."""
    for block in blocks(README, "python"):
        assert run([sys.executable, "-c", block], stack.url).strip()
    (curl,) = (line for line in shell_lines(README) if line.startswith("curl "))
    answer = json.loads(run([*shlex.split(curl), "--silent"], stack.url))
    assert "sky" in answer["choices"][0]["message"]["content"]


def run(command: list[str], url: str) -> str:
    command = [word.replace("http://127.0.0.1:8000", url) for word in command]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
