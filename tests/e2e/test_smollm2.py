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

from tests.e2e.stacks import Stack, serve
from tests.markdown import blocks, shell_lines

README = Path(__file__).parents[2] / "README.md"

QUESTIONS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "List three colours. " * 30,  # longer than a chunk
)


@pytest.fixture(scope="module")
def stack(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with serve(
        smollm2, "native(P:d1t1p1|D:d1t1p1)", tmp_path_factory.mktemp("real"), "--chunked-prefill-size", "128"
    ) as s:
        yield s


@pytest.fixture
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.slow
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


@pytest.mark.slow
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
