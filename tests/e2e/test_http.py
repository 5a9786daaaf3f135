"""What only one endpoint takes (batches, token ids, prompt logprobs, conversations), and OpenAI's client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.e2e.stacks import Stack, client

BRIEF = {"temperature": 0, "max_tokens": 7}
SEEDED = {"temperature": 1, "seed": 8, "max_tokens": 9}
LONG = "hello there " * 12
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "ids": ("/generate", {"input_ids": list(range(20, 60))}),
    "batch": ("/generate", {"text": ["one", "two two", LONG]}),
    "batch of samples": (
        "/generate",
        {"text": ["one", "two"], "sampling_params": {"n": 2, "temperature": 1, "sampling_seed": 8}},
    ),
    "prompt logprobs": ("/generate", {"text": LONG, "return_logprob": True, "logprob_start_len": 0}),
    "the rest of the prompt's": ("/generate", {"text": LONG, "return_logprob": True, "logprob_start_len": 30}),
    "prompts": ("/v1/completions", {"prompt": ["one", "two two"], "n": 2, **SEEDED}),
    "lists of ids": ("/v1/completions", {"prompt": [[20, 21, 22], list(range(30, 90))], **BRIEF}),
    "echo": ("/v1/completions", {"prompt": [LONG, "hello"], "echo": True, "logprobs": 2, **BRIEF}),
    "score": ("/v1/completions", {"prompt": LONG, "echo": True, "logprobs": 1, "max_tokens": 0}),
    "choice": ("/v1/completions", {"prompt": "yes or no?", "guided_choice": ["yes", "no"], **SEEDED}),
    "conversation": (
        "/v1/chat/completions",
        {
            "messages": [
                {"role": "system", "content": "Zwölf"},
                {"role": "user", "content": [{"type": "text", "text": LONG}]},
                {"role": "assistant", "content": "größer"},
                {"role": "user", "content": "🏃 ok?"},
            ],
            **BRIEF,
        },
    ),
    "any object": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "{"}], "response_format": {"type": "json_object"}, **SEEDED},
    ),
}


def whole(stack: Stack, path: str, body: dict[str, Any]) -> dict[int, Any]:
    """The answers by index, without what differs from run to run."""
    with client(stack.url) as http:
        response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    answer = response.json()
    if path == "/generate":
        return dict(enumerate(map(generated, answer if isinstance(answer, list) else [answer])))
    return {choice["index"]: grown({}, choice) for choice in answer["choices"]}


def streamed(stack: Stack, path: str, body: dict[str, Any]) -> dict[int, Any]:
    answers: dict[int, Any] = {}
    with client(stack.url) as http, http.stream("POST", path, json={**body, "stream": True}) as response:
        data = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
    assert data.pop() == "[DONE]"
    for event in map(json.loads, data):
        if path == "/generate":  # cumulative
            answers[event.get("index", 0)] = generated(event)
        for choice in event.get("choices", ()):
            answers[choice["index"]] = grown(answers.get(choice["index"], {}), choice)
    return answers


def generated(answer: dict[str, Any]) -> dict[str, Any]:
    meta = answer["meta_info"]
    kept = ("finish_reason", "prompt_tokens", "completion_tokens", "output_token_logprobs", "input_token_logprobs")
    return {"text": answer["text"], "ids": answer["output_ids"], **{name: meta.get(name) for name in kept}}


def grown(so_far: dict[str, Any], choice: dict[str, Any]) -> dict[str, Any]:
    """An answer of the OpenAI routes, after one more piece of it."""
    message = choice.get("message") or choice.get("delta") or {}
    columns = dict(so_far.get("logprobs", {}))
    for name, column in (choice["logprobs"] or {}).items():
        columns[name] = columns.get(name, []) + (column or [])
    return {
        "text": so_far.get("text", "") + (choice.get("text") or message.get("content") or ""),
        "finish": choice["finish_reason"] or so_far.get("finish"),
        "logprobs": columns,
    }


def parted(value: Any, numbers: list[float]) -> Any:
    """`value` without its floats, which go into `numbers`: they may differ in their last bits."""
    if isinstance(value, float):
        numbers.append(value)
        return "float"
    if isinstance(value, dict):
        return {key: parted(value[key], numbers) for key in sorted(value)}
    return [parted(item, numbers) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize(("path", "body"), BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("ask", [whole, streamed])
def test_prefill_and_decode_apart_are_one(pd: Stack, unified: Stack, ask: Any, path: str, body: dict[str, Any]) -> None:
    if path == "/generate":
        body = {"sampling_params": {"temperature": 0, "max_new_tokens": 7}, **body}
    ours, theirs = list[float](), list[float]()
    answers = whole(unified, path, body)
    assert parted(ask(pd, path, body), ours) == parted(answers, theirs)
    assert ours == pytest.approx(theirs, abs=1e-3)


@pytest.fixture
def api(pd: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{pd.url}/v1", api_key="none", max_retries=0) as api:
        yield api


def test_the_openai_client(api: openai.OpenAI) -> None:
    model = api.models.list().data[0].id
    messages: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]
    plain = api.chat.completions.create(
        model=model, messages=messages, max_tokens=10, temperature=0, logprobs=True, top_logprobs=2
    )
    assert plain.usage is not None
    assert plain.usage.completion_tokens <= 10
    assert plain.choices[0].logprobs is not None
    assert len(plain.choices[0].logprobs.content or []) == plain.usage.completion_tokens
    stream = api.chat.completions.create(
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
    three = api.completions.create(model=model, prompt="hello", n=3, seed=4, temperature=1, max_tokens=6)
    assert [choice.index for choice in three.choices] == [0, 1, 2]


def test_the_openai_client_reads_refusals(api: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no-such-model") as unknown:
        api.chat.completions.create(model="no-such-model", messages=[{"role": "user", "content": "hi"}])
    assert (unknown.value.param, unknown.value.type) == ("model", "not_found_error")
    with pytest.raises(openai.BadRequestError, match="n is 0") as none:
        api.completions.create(model="default", prompt="hi", n=0)
    assert (none.value.param, none.value.code) == ("n", "invalid_request_error")
    with pytest.raises(openai.BadRequestError, match="context holds 512"):
        api.chat.completions.create(model="default", messages=[{"role": "user", "content": "word " * 900}], stream=True)


def test_a_stream_that_the_openai_client_leaves(api: openai.OpenAI) -> None:
    with api.completions.create(
        model="default", prompt="hi", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        assert next(iter(stream)).choices
