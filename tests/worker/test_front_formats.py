"""What clients get: the openai package and plain HTTP, streamed and not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from .rig import MODEL, Rig, paced, serving


@pytest.fixture
def client(rig: Rig) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{rig.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def post(rig: Rig, path: str, **body: object) -> httpx.Response:
    return httpx.post(f"{rig.url}{path}", json=body, timeout=20)


def events(rig: Rig, path: str, **body: object) -> list[dict[str, object]]:
    with httpx.stream("POST", f"{rig.url}{path}", json={**body, "stream": True}, timeout=20) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def test_completion_says_the_prompt_again(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="hello there", max_tokens=20)
    assert answer.choices[0].text.startswith("hello there")
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 20
    assert answer.usage.total_tokens == 20 + answer.usage.prompt_tokens


def test_completion_streamed_is_the_same(client: openai.OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt="hello ünïcödé 🙂 there", max_tokens=40)
    options = {"include_usage": True}
    chunks = list(
        client.completions.create(
            model=MODEL, prompt="hello ünïcödé 🙂 there", max_tokens=40, stream=True, stream_options=options
        )
    )
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert "🙂" in whole.choices[0].text
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"


def test_a_stream_never_shows_half_a_character(rig: Rig) -> None:
    body = {"prompt": "🙂🚀é", "max_tokens": 33}
    whole = post(rig, "/v1/completions", **body).json()["choices"][0]["text"]
    texts = [event["choices"][0]["text"] for event in events(rig, "/v1/completions", **body)]
    assert "".join(texts) == whole
    assert not any("\ufffd" in text for text in texts[:-2])


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
SAID_AGAIN = 'So:<tool_call>{"name": "f", "arguments": {"x": [1, "}"]}}</tool_call>'


def test_calls_of_tools(model_dir: Path, tmp_path: Path) -> None:
    """The model says the prompt again, up to the end of the user's message."""
    with serving(model_dir, tmp_path, tool_call_parser="hermes", reasoning_parser="qwen3") as rig:
        info = httpx.get(f"{rig.url}/model_info", timeout=20).json()
        assert (info["tool_call_parser"], info["reasoning_parser"]) == ("hermes", "qwen3")
        with openai.OpenAI(base_url=f"{rig.url}/v1", api_key="none", max_retries=0) as client:
            messages = [{"role": "user", "content": SAID_AGAIN}]
            body: dict[str, Any] = {"model": MODEL, "messages": messages, "tools": [TOOL]}
            choice = client.chat.completions.create(**body).choices[0]
            assert choice.finish_reason == "tool_calls"
            assert choice.message.content == "user\nSo:"
            assert choice.message.tool_calls is not None
            assert choice.message.tool_calls[0].function.name == "f"
            assert json.loads(choice.message.tool_calls[0].function.arguments) == {"x": [1, "}"]}
            with paced(rig, 0.005):
                chunks = list(client.chat.completions.create(**body, stream=True))
            calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
            assert len(calls) > 2
            assert calls[0].id
            assert calls[0].function.name == "f"
            assert "".join(call.function.arguments for call in calls) == '{"x": [1, "}"]}'
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "user\nSo:"
            assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_chat(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "hi"}]
    answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=4)
    assert answer.choices[0].message.content == "user\nh"[: len(answer.choices[0].message.content)]
    assert answer.choices[0].message.role == "assistant"
    chunks = list(client.chat.completions.create(model=MODEL, messages=messages, max_tokens=4, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == answer.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "length"


def test_chat_without_max_tokens_goes_on_to_the_end_of_turn(client: openai.OpenAI) -> None:
    """The echoed prompt contains <|im_end|>, an end-of-sequence token: it is counted, but not shown."""
    answer = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hello"}])
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content == "user\nhello"


def test_chat_content_parts_and_tokens_limits(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": parts}], max_completion_tokens=3
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3


def test_three_samples(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="hello", n=3, seed=4, temperature=1, max_tokens=6)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 18
    assert answer.usage.prompt_tokens < 6
    stream = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "hello"}], n=3, max_tokens=5, stream=True
    )
    texts = {0: "", 1: "", 2: ""}
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert len(set(texts.values())) == 1
    assert texts[0]


def test_many_prompts(client: openai.OpenAI, rig: Rig) -> None:
    answer = client.completions.create(model=MODEL, prompt=["hello", "there", "fox"], max_tokens=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.text[:2] for choice in answer.choices] == ["he", "th", "fo"]
    ids = client.completions.create(model=MODEL, prompt=[[5, 6], [7]], max_tokens=1)
    assert len(ids.choices) == 2
    one = post(rig, "/v1/completions", model=MODEL, prompt=[70, 71, 72], max_tokens=3, return_token_ids=True).json()
    assert one["choices"][0]["token_ids"] == [70, 71, 72]


def test_chat_logprobs(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "hello"}]
    answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=5, logprobs=True, top_logprobs=2)
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    assert len(content) == 5
    assert all(len(entry.top_logprobs) == 2 for entry in content)
    assert content[1].logprob < 0
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=messages, max_tokens=5, logprobs=True, top_logprobs=2, stream=True
        )
    )
    streamed = [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content or []]
    assert streamed == content


def test_completion_logprobs_with_echo(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="hello there", max_tokens=3, logprobs=2, echo=True)
    choice = answer.choices[0]
    assert choice.text.startswith("hello therehello"[: len(choice.text)])
    assert answer.usage is not None
    columns = choice.logprobs
    assert columns is not None
    assert len(columns.tokens or []) == answer.usage.total_tokens
    assert (columns.token_logprobs or [0])[0] is None
    assert all(value is not None for value in (columns.token_logprobs or [])[1:])
    assert "".join(columns.tokens or []) == choice.text
    assert (columns.text_offset or [])[:2] == [0, len((columns.tokens or [""])[0])]


def test_scoring_a_prompt_without_generating(rig: Rig) -> None:
    body = {"prompt": "hello there", "max_tokens": 0, "logprobs": 0, "echo": True}
    answer = post(rig, "/v1/completions", **body).json()
    assert answer["choices"][0]["text"] == "hello there"
    assert answer["usage"]["completion_tokens"] == 0
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == answer["usage"]["prompt_tokens"]


@pytest.mark.parametrize("stop", ["there", ["zzz", "lo th"]])
def test_stop_strings(rig: Rig, stop: object) -> None:
    body = {"prompt": "hello there", "max_tokens": 100, "stop": stop}
    answer = post(rig, "/v1/completions", **body).json()
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] == (stop if isinstance(stop, str) else stop[1])
    assert choice["text"] == "hello there".split(choice["stop_reason"])[0]
    streamed = events(rig, "/v1/completions", **body)
    assert "".join(event["choices"][0]["text"] for event in streamed) == choice["text"]
    assert streamed[-1]["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] < 100
    rig.settle()


def test_stop_kept_on_request(rig: Rig) -> None:
    body = {"prompt": "hello there", "max_tokens": 100, "stop": "lo", "include_stop_str_in_output": True}
    assert post(rig, "/v1/completions", **body).json()["choices"][0]["text"] == "hello"


def test_min_tokens_holds_stop_strings_off(rig: Rig) -> None:
    body = {"prompt": "hello there", "max_tokens": 30, "stop": "hello", "min_tokens": 8}
    choice = post(rig, "/v1/completions", **body).json()["choices"][0]
    assert choice["text"].startswith("hello there")
    assert choice["finish_reason"] == "stop"


def test_stop_token(rig: Rig) -> None:
    body = {"prompt": [70, 71, 72, 73], "max_tokens": 30, "stop_token_ids": [72], "return_token_ids": True}
    choice = post(rig, "/v1/completions", **body).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] == 72
    assert choice["token_ids"] == [70, 71, 72]
    assert len(choice["text"]) == 2


def test_generate(rig: Rig) -> None:
    answer = post(rig, "/generate", text="hello there", rid="mine", sampling_params={"max_new_tokens": 5}).json()
    assert answer["text"].startswith("hel")
    assert len(answer["output_ids"]) == 5
    meta = answer["meta_info"]
    assert meta["id"] == "mine"
    assert meta["finish_reason"] == {"type": "length", "length": 5}
    assert meta["completion_tokens"] == 5
    assert meta["e2e_latency"] >= meta["first_token_latency"] > 0
    assert set(meta["timeline"]) >= {"scheduled", "prefilled", "first_token", "finished"}


def test_generate_streams_cumulatively(rig: Rig) -> None:
    body = {"text": 'hello "there"\n🙂', "sampling_params": {"max_new_tokens": 30}}
    whole = post(rig, "/generate", **body).json()
    with paced(rig, 0.003):
        streamed = events(rig, "/generate", **body)
    assert len(streamed) > 10
    assert streamed[-1]["text"] == whole["text"]
    assert streamed[-1]["output_ids"] == whole["output_ids"]
    assert streamed[-1]["meta_info"]["finish_reason"] == {"type": "length", "length": 30}
    for before, after in pairwise(streamed):
        assert after["text"].startswith(before["text"])
        assert after["output_ids"][: len(before["output_ids"])] == before["output_ids"]
    assert streamed[0]["meta_info"]["finish_reason"] is None


def test_generate_batch(rig: Rig) -> None:
    params = [{"max_new_tokens": 2}, {"max_new_tokens": 4}]
    answers = post(rig, "/generate", text=["hello", "there"], sampling_params=params).json()
    assert [answer["meta_info"]["completion_tokens"] for answer in answers] == [2, 4]
    streamed = events(rig, "/generate", text=["hello", "there"], sampling_params=params)
    assert {event["index"] for event in streamed} == {0, 1}
    ids = post(rig, "/generate", input_ids=[[70, 71], [72]], sampling_params={"max_new_tokens": 2, "n": 2}).json()
    assert [answer["output_ids"] for answer in ids] == [[70, 71], [70, 71], [72, 72], [72, 72]]
    assert isinstance(post(rig, "/generate", text=["one"]).json(), list)


def test_generate_logprobs(rig: Rig) -> None:
    body = {
        "input_ids": [70, 71, 72],
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": 2,
        "return_text_in_logprobs": True,
        "sampling_params": {"max_new_tokens": 2},
    }
    meta = post(rig, "/generate", **body).json()["meta_info"]
    assert [entry[:2] for entry in meta["input_token_logprobs"]] == [[None, 70], [-0.071, 71], [-0.072, 72]]
    assert [entry[:2] for entry in meta["output_token_logprobs"]] == [[-0.07, 70], [-0.071, 71]]
    assert all(isinstance(entry[2], str) for entry in meta["output_token_logprobs"])
    assert meta["input_top_logprobs"][0] is None
    assert [entry[1] for entry in meta["output_top_logprobs"][1]] == [71, 72]
    later = post(rig, "/generate", **{**body, "logprob_start_len": 2}).json()["meta_info"]
    assert [entry[1] for entry in later["input_token_logprobs"]] == [72]
    only_output = post(rig, "/generate", **{**body, "logprob_start_len": -1}).json()["meta_info"]
    assert only_output["input_token_logprobs"] == []
    assert events(rig, "/generate", **body)[-1]["meta_info"]["input_token_logprobs"] == meta["input_token_logprobs"]


def test_generate_stop_string_is_named(rig: Rig) -> None:
    body = {"text": "hello there", "sampling_params": {"max_new_tokens": 50, "stop": ["ther"]}}
    answer = post(rig, "/generate", **body).json()
    assert answer["text"] == "hello "
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": "ther"}


def test_cached_tokens_are_told(client: openai.OpenAI) -> None:
    for _ in range(2):
        answer = client.completions.create(model=MODEL, prompt="the quick brown fox " * 8, max_tokens=1)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens


def test_request_ids(rig: Rig) -> None:
    headers = {"x-request-id": "from-the-header"}
    body = {"text": "hello", "sampling_params": {"max_new_tokens": 1}}
    answer = httpx.post(f"{rig.url}/generate", json=body, headers=headers, timeout=10)
    assert answer.json()["meta_info"]["id"] == "from-the-header"
    assert answer.headers["x-request-id"] == "from-the-header"
    chat: dict[str, object] = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    named = httpx.post(f"{rig.url}/v1/chat/completions", json=chat, headers=headers, timeout=10)
    assert named.json()["id"] == "chatcmpl-from-the-header"
    chat["rid"] = "in\nthe body"
    assert httpx.post(f"{rig.url}/v1/chat/completions", json=chat, timeout=10).json()["id"] == "in\nthe body"
    fresh = post(rig, "/v1/completions", prompt="a", max_tokens=1)
    assert fresh.json()["id"].startswith("cmpl-")
    assert "x-request-id" not in fresh.headers


def test_ids_may_repeat(rig: Rig) -> None:
    body = {"text": ["hello", "there"], "rid": ["same", "same"], "sampling_params": {"max_new_tokens": 2}}
    answers = post(rig, "/generate", **body).json()
    assert [answer["meta_info"]["id"] for answer in answers] == ["same", "same"]
    assert answers[0]["output_ids"] != answers[1]["output_ids"]
