"""Bad input is told in the right shape, and the server lives."""

from __future__ import annotations

import json
import socket

import httpx
import pytest

from baton.api.sampling import MAX_SAMPLES

from .rig import MODEL, Rig, raw_connection

COMPLETIONS = {
    "broken JSON": (b'{"prompt": "a', 400, None),
    "not an object": (b"[1, 2]", 400, None),
    "empty": (b"", 400, None),
    "invalid UTF-8": (b'{"prompt": "\xff\xfe"}', 400, None),
    "deeply nested": (b'{"prompt": "a", "response_format": ' + b'{"a":' * 3000 + b"1" + b"}" * 3000 + b"}", 400, None),
    "lone surrogate": (b'{"prompt": "\\ud800"}', 400, None),
    "no prompt": (b'{"max_tokens": 4}', 400, None),
    "prompt is an object": (b'{"prompt": {"a": 1}}', 400, "prompt"),
    "prompt is a mixture": (b'{"prompt": ["a", 1]}', 400, "prompt"),
    "prompt is empty": (b'{"prompt": ""}', 400, "prompt"),
    "no prompts": (b'{"prompt": []}', 400, "prompt"),
    "token outside the vocabulary": (b'{"prompt": [5, 4000]}', 400, "prompt"),
    "negative token": (b'{"prompt": [5, -1]}', 400, "prompt"),
    "huge token": (b'{"prompt": [5, 99999999999999999999999]}', 400, "prompt"),
    "prompt too long": (json.dumps({"prompt": list(range(256)) * 5}).encode(), 400, "prompt"),
    "prompt far too long": (b'{"prompt": "' + b"word " * 40000 + b'"}', 400, "prompt"),
    "prompt and max_tokens too long": (b'{"prompt": "a", "max_tokens": 5000}', 400, "max_tokens"),
    "n is 0": (b'{"prompt": "a", "n": 0}', 400, "n"),
    "n is large": (b'{"prompt": "a", "n": %d}' % (MAX_SAMPLES + 1), 400, "n"),
    "n is a word": (b'{"prompt": "a", "n": "two"}', 400, "n"),
    "negative max_tokens": (b'{"prompt": "a", "max_tokens": -4}', 400, "max_tokens"),
    "max_tokens 0": (b'{"prompt": "a", "max_tokens": 0}', 400, "max_tokens"),
    "min_tokens above max_tokens": (b'{"prompt": "a", "max_tokens": 3, "min_tokens": 4}', 400, "min_tokens"),
    "temperature is a word": (b'{"prompt": "a", "temperature": "hot"}', 400, "temperature"),
    "temperature below 0": (b'{"prompt": "a", "temperature": -0.1}', 400, "temperature"),
    "temperature infinite": (b'{"prompt": "a", "temperature": 1e999}', 400, None),
    "top_p 0": (b'{"prompt": "a", "top_p": 0}', 400, "top_p"),
    "top_k -2": (b'{"prompt": "a", "top_k": -2}', 400, "top_k"),
    "min_p 2": (b'{"prompt": "a", "min_p": 2}', 400, "min_p"),
    "presence_penalty 3": (b'{"prompt": "a", "presence_penalty": 3}', 400, "presence_penalty"),
    "repetition_penalty 0": (b'{"prompt": "a", "repetition_penalty": 0}', 400, "repetition_penalty"),
    "logprobs 21": (b'{"prompt": "a", "logprobs": 21}', 400, "logprobs"),
    "logit_bias key": (b'{"prompt": "a", "logit_bias": {"x": 1}}', 400, "logit_bias"),
    "logit_bias outside the vocabulary": (b'{"prompt": "a", "logit_bias": {"4000": 1}}', 400, "logit_bias"),
    "logit_bias value": (b'{"prompt": "a", "logit_bias": {"4": 101}}', 400, "logit_bias"),
    "empty stop": (b'{"prompt": "a", "stop": ""}', 400, "stop"),
    "seed too large": (b'{"prompt": "a", "seed": 99999999999999999999999}', 400, "seed"),
    "suffix": (b'{"prompt": "a", "suffix": "b"}', 400, "suffix"),
    "prompt_logprobs": (b'{"prompt": "a", "prompt_logprobs": 1}', 400, "prompt_logprobs"),
    "beams": (b'{"prompt": "a", "use_beam_search": true}', 400, "use_beam_search"),
    "best_of": (b'{"prompt": "a", "best_of": 3}', 400, "best_of"),
    "response_format": (b'{"prompt": "a", "response_format": {"type": "xml"}}', 400, "response_format"),
    "two grammars": (b'{"prompt": "a", "regex": "a", "guided_regex": "b"}', 400, "guided_regex"),
    "room out of range": (b'{"prompt": "a", "bootstrap_room": -1}', 400, "bootstrap_room"),
    "room of the wrong type": (b'{"prompt": "a", "bootstrap_room": "x"}', 400, "bootstrap_room"),
    "rooms of the wrong number": (b'{"prompt": "a", "bootstrap_room": [1, 2]}', 400, "bootstrap_room"),
    "unknown model": (b'{"prompt": "a", "model": "gpt-17"}', 404, "model"),
    "10 MB": (b'{"prompt": "' + b"a" * 10_000_000 + b'"}', 413, None),
}


def check_error(response: httpx.Response, status: int, param: str | None) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    assert error["message"]
    if param is not None:
        assert error["param"] == param


def lives(rig: Rig) -> None:
    answer = httpx.post(f"{rig.url}/v1/completions", json={"prompt": "a", "max_tokens": 1}, timeout=10)
    assert answer.status_code == 200


@pytest.mark.parametrize(("body", "status", "param"), COMPLETIONS.values(), ids=COMPLETIONS)
def test_completions(rig: Rig, body: bytes, status: int, param: str | None) -> None:
    headers = {"content-type": "application/json"}
    check_error(httpx.post(f"{rig.url}/v1/completions", content=body, headers=headers, timeout=10), status, param)
    lives(rig)


CHAT = {
    "no messages": ({"messages": []}, "messages"),
    "messages of the wrong type": ({"messages": "hi"}, "messages"),
    "message without role": ({"messages": [{"content": "hi"}]}, "messages[0].role"),
    "image": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0]"),
    "content is a number": ({"messages": [{"role": "user", "content": 4}]}, "messages[0].content"),
    "top_logprobs alone": ({"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}, "top_logprobs"),
    "forced tool": ({"messages": [{"role": "user", "content": "a"}], "tool_choice": "required"}, "tool_choice"),
    "completion tokens": (
        {"messages": [{"role": "user", "content": "a"}], "max_completion_tokens": 0},
        "max_completion_tokens",
    ),
    "schema missing": (
        {"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "json_schema"}},
        "response_format",
    ),
}


@pytest.mark.parametrize(("body", "param"), CHAT.values(), ids=CHAT)
def test_chat(rig: Rig, body: dict[str, object], param: str) -> None:
    check_error(httpx.post(f"{rig.url}/v1/chat/completions", json=body, timeout=10), 400, param)


GENERATE = {
    "nothing": ({}, "text"),
    "both": ({"text": "a", "input_ids": [1]}, "text"),
    "mixture": ({"input_ids": [1, [2]]}, "input_ids"),
    "params of the wrong number": ({"text": ["a", "b"], "sampling_params": [{}]}, "sampling_params"),
    "new tokens": ({"text": "a", "sampling_params": {"max_new_tokens": -1}}, "max_new_tokens"),
    "image": ({"text": "a", "image_data": "x"}, "image_data"),
    "top logprobs": ({"text": "a", "return_logprob": True, "top_logprobs_num": 1000}, "top_logprobs_num"),
    "start": ({"text": "a", "return_logprob": True, "logprob_start_len": -5}, "logprob_start_len"),
    "unequal n": ({"text": ["a", "b"], "sampling_params": [{"n": 1}, {"n": 2}]}, "n"),
    "rank": ({"text": "a", "routed_dp_rank": 3}, "routed_dp_rank"),
    "port": ({"text": "a", "bootstrap_room": 3, "bootstrap_port": 70000}, "bootstrap_port"),
    "empty rid": ({"text": "a", "rid": ""}, None),
    "long rid": ({"text": "a", "rid": "x" * 300}, "rid"),
}


@pytest.mark.parametrize(("body", "param"), GENERATE.values(), ids=GENERATE)
def test_generate(rig: Rig, body: dict[str, object], param: str | None) -> None:
    response = httpx.post(f"{rig.url}/generate", json=body, timeout=10)
    if param is None:
        assert response.status_code == 200
    else:
        check_error(response, 400, param)


def test_errors_before_the_stream_are_real_statuses(rig: Rig) -> None:
    body = {"prompt": "a", "max_tokens": 5000, "stream": True}
    check_error(httpx.post(f"{rig.url}/v1/completions", json=body, timeout=10), 400, "max_tokens")


def test_content_type(rig: Rig) -> None:
    response = httpx.post(f"{rig.url}/v1/completions", content=b"prompt=a", headers={"content-type": "text/plain"})
    check_error(response, 400, None)
    odd = httpx.post(
        f"{rig.url}/v1/completions",
        content=b'{"prompt": "a", "max_tokens": 1}',
        headers={"content-type": "Application/JSON; charset=utf-8"},
    )
    assert odd.status_code == 200


def test_unknown_keys_and_nulls_are_ignored(rig: Rig) -> None:
    body = {
        "prompt": "a", "max_tokens": 1, "frobnicate": {"x": [1]}, "log_metrics": True, "background": False,
        "bootstrap_host": None, "bootstrap_port": None, "bootstrap_room": None, "temperature": None, "stop": None,
        "model": MODEL, "n": None, "seed": None, "stream": None, "stream_options": None, "user": "me", "logit_bias": {},
    }  # fmt: skip
    assert httpx.post(f"{rig.url}/v1/completions", json=body).status_code == 200


def test_unknown_paths_and_methods(rig: Rig) -> None:
    check_error(httpx.get(f"{rig.url}/v1/nothing"), 404, None)
    check_error(httpx.get(f"{rig.url}/v1/completions"), 405, None)


def test_a_large_body_is_not_read_to_its_end(rig: Rig) -> None:
    """The refusal comes after the headers alone; nothing of the body was sent yet."""
    with raw_connection(rig) as connection:
        head = (
            "POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 99999999\r\n\r\n"
        )
        connection.sendall(head.encode())
        answer = connection.recv(65536)
        assert b" 413 " in answer.split(b"\r\n")[0]
        assert b"connection: close" in answer.lower()
        connection.shutdown(socket.SHUT_WR)
    lives(rig)


def test_a_large_chunked_body_is_refused_too(rig: Rig) -> None:
    def chunks() -> object:
        for _ in range(12):
            yield b" " * 2**20

    response = httpx.post(
        f"{rig.url}/generate",
        content=chunks(),  # type: ignore[arg-type]
        headers={"content-type": "application/json"},
        timeout=10,
    )
    check_error(response, 413, None)


def test_half_a_request_leaves_nothing(rig: Rig) -> None:
    with raw_connection(rig) as connection:
        connection.sendall(b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
    lives(rig)
    rig.settle()
