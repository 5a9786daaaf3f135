"""A tiny model behind the whole stack, asked by real clients: divided and undivided stacks give the same answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from tests.e2e.stacks import Stack, serve

FLAGS = ("--kv-pages", "256", "--max-model-len", "512", "--page-size", "8", "--chunked-prefill-size", "32")


@pytest.fixture(scope="module")
def undivided(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with serve(tiny_model_dir, "native:d1t1p1", tmp_path_factory.mktemp("whole"), *FLAGS) as stack:
        yield stack


@pytest.fixture(scope="module", params=["shm", "tcp"])
def divided(
    request: pytest.FixtureRequest, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    flags = (*FLAGS, "--disaggregation-transfer-backend", request.param)
    with serve(tiny_model_dir, "native(P:d1t1p1|D:d1t1p1)", tmp_path_factory.mktemp("pd"), *flags) as stack:
        yield stack


def generate(stack: Stack, **body: object) -> object:
    response = httpx.post(f"{stack.url}/generate", json=body, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


def forget_times(answer: object) -> object:
    """An answer without what may differ from run to run."""
    if isinstance(answer, list):
        return [forget_times(item) for item in answer]
    assert isinstance(answer, dict)
    meta = answer["meta_info"]
    kept = ("finish_reason", "prompt_tokens", "completion_tokens", "output_token_logprobs", "input_token_logprobs")
    return {
        "text": answer["text"],
        "output_ids": answer["output_ids"],
        **{k: rounded(meta[k]) for k in kept if k in meta},
    }


def rounded(value: object) -> object:
    if isinstance(value, float):
        return round(value, 3)
    return [rounded(item) for item in value] if isinstance(value, list) else value


BODIES = {
    "greedy": {"text": "hello there", "sampling_params": {"temperature": 0, "max_new_tokens": 16}},
    "long": {"text": "hello there " * 20, "sampling_params": {"temperature": 0, "max_new_tokens": 16}},
    "seeded": {
        "text": "a b c",
        "sampling_params": {"temperature": 1, "top_p": 0.9, "sampling_seed": 5, "max_new_tokens": 20},
    },
    "one": {"text": "hello", "sampling_params": {"temperature": 0, "max_new_tokens": 1}},
    "ids": {"input_ids": list(range(20, 60)), "sampling_params": {"temperature": 0, "max_new_tokens": 5}},
    "batch": {"text": ["one", "two two", "three " * 9], "sampling_params": {"temperature": 0, "max_new_tokens": 7}},
    "samples": {
        "text": "hello",
        "sampling_params": {"n": 3, "temperature": 1, "sampling_seed": 8, "max_new_tokens": 9},
    },
    "logprobs": {
        "text": "hello there",
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": 2,
        "sampling_params": {"temperature": 0, "max_new_tokens": 4},
    },
    "stop": {
        "text": "hello there",
        "sampling_params": {"temperature": 1, "sampling_seed": 1, "max_new_tokens": 64, "stop": ["e", "a", "i", "o"]},
    },
    "regex": {
        "text": "a number:",
        "sampling_params": {"temperature": 1, "sampling_seed": 2, "max_new_tokens": 12, "regex": "[1-9][0-9]{0,4}"},
    },
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_divided_is_undivided(divided: Stack, undivided: Stack, body: dict[str, object]) -> None:
    assert forget_times(generate(divided, **body)) == forget_times(generate(undivided, **body))


@pytest.mark.parametrize("body", [BODIES[k] for k in ("greedy", "long", "seeded", "stop", "one")])
def test_streamed_is_not_streamed(divided: Stack, body: dict[str, object]) -> None:
    whole = generate(divided, **body)
    assert isinstance(whole, dict)
    with httpx.stream("POST", f"{divided.url}/generate", json={**body, "stream": True}, timeout=60) as response:
        events = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["text"] == whole["text"]
    assert json.loads(events[-2])["output_ids"] == whole["output_ids"]


def test_many_at_once(divided: Stack, undivided: Stack) -> None:
    bodies = [
        {"text": f"question {i} " * (i % 7 + 1), "sampling_params": {"temperature": 0, "max_new_tokens": 5 + i % 9}}
        for i in range(24)
    ]
    with ThreadPoolExecutor(12) as pool:
        ours = list(pool.map(lambda body: forget_times(generate(divided, **body)), bodies))
        theirs = list(pool.map(lambda body: forget_times(generate(undivided, **body)), bodies))
    assert ours == theirs


@pytest.fixture
def client(divided: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{divided.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_openai_client(client: openai.OpenAI) -> None:
    model = client.models.list().data[0].id
    messages: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]
    plain = client.chat.completions.create(
        model=model, messages=messages, max_tokens=10, temperature=0, logprobs=True, top_logprobs=2
    )
    assert plain.usage is not None
    assert plain.usage.completion_tokens <= 10
    assert plain.choices[0].logprobs is not None
    assert len(plain.choices[0].logprobs.content or []) == plain.usage.completion_tokens
    stream = client.chat.completions.create(
        model=model,
        messages=messages,
        max_tokens=10,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == plain.choices[0].message.content
    usage = chunks[-1].usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (plain.usage.prompt_tokens, plain.usage.completion_tokens)
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens  # the prompt was there from the first time
    three = client.completions.create(model=model, prompt="hello", n=3, seed=4, temperature=1, max_tokens=6)
    assert [choice.index for choice in three.choices] == [0, 1, 2]


def test_a_request_for_another_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no-such-model"):
        client.chat.completions.create(model="no-such-model", messages=[{"role": "user", "content": "hi"}])


BAD = {
    "broken JSON": (b'{"prompt": "a', 400),
    "not an object": (b"[1, 2]", 400),
    "invalid UTF-8": (b'{"model": "m", "prompt": "\xff\xfe"}', 400),
    "wrong type": (b'{"prompt": {"a": 1}}', 400),
    "n is 0": (b'{"prompt": "a", "n": 0}', 400),
    "negative max_tokens": (b'{"prompt": "a", "max_tokens": -4}', 400),
    "temperature is a word": (b'{"prompt": "a", "temperature": "hot"}', 400),
    "too long": (b'{"prompt": "' + b"word " * 4000 + b'"}', 400),
    "10 MB": (b'{"prompt": "' + b"a" * 10_000_000 + b'"}', 413),
    "empty": (b"", 400),
}


@pytest.mark.parametrize(("body", "status"), BAD.values(), ids=BAD)
def test_bad_input_is_told_and_hurts_nobody(divided: Stack, body: bytes, status: int) -> None:
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{divided.url}/v1/completions", content=body, headers=headers, timeout=30)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    assert error["message"]
    assert generate(divided, text="still here?", sampling_params={"max_new_tokens": 2})


def test_a_prefill_worker_needs_a_room(divided: Stack) -> None:
    prefill = next(str(worker["url"]) for worker in divided.workers() if worker["worker_type"] == "prefill")
    response = httpx.post(f"{prefill}/v1/completions", json={"prompt": "a", "max_tokens": 3}, timeout=30)
    assert response.status_code == 400
    assert "bootstrap_room" in response.json()["error"]["message"]


def test_a_decode_worker_serves_a_roomless_request_whole(divided: Stack, undivided: Stack) -> None:
    decode = next(str(worker["url"]) for worker in divided.workers() if worker["worker_type"] == "decode")
    body = BODIES["greedy"]
    response = httpx.post(f"{decode}/generate", json=body, timeout=30)
    assert forget_times(response.json()) == forget_times(generate(undivided, **body))


def loads(stack: Stack) -> list[dict[str, object]]:
    answers = [httpx.get(f"{worker['url']}/v1/loads", timeout=5).json() for worker in stack.workers()]
    return [answer["loads"][0] for answer in answers]


def test_a_client_that_leaves_frees_everything(divided: Stack) -> None:
    """Twenty streams are dropped at different moments; soon nothing of them is left on either side."""

    def start_and_leave(number: int) -> None:
        body = {
            "text": "word " * 50,
            "stream": True,
            "sampling_params": {"max_new_tokens": 300, "ignore_eos": True, "temperature": 0},
        }
        try:
            with httpx.stream("POST", f"{divided.url}/generate", json=body, timeout=0.02 * number + 0.01) as response:
                for seen, _ in enumerate(response.iter_lines()):
                    if seen > number:
                        return
        except httpx.TimeoutException:
            return

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(start_and_leave, range(20)))
    waiting = threading.Event()
    for _ in range(100):
        if all(not load["num_running_reqs"] and not load["num_waiting_reqs"] for load in loads(divided)):
            break
        waiting.wait(0.1)
    for load in loads(divided):
        assert load["num_running_reqs"] == load["num_waiting_reqs"] == load["num_used_tokens"] == 0
    assert generate(divided, text="and now?", sampling_params={"max_new_tokens": 2})
