"""Prompt logprobs: P has them, D answers, the client gets both."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from baton.gateway.merge import CannotMerge, Merger
from tests.gateway.stack import Stack, with_stack
from tests.router.mocks import events, whole

INPUT = [[None, 1, "a"], [-0.5, 2, "b"]]
TOPS = [None, [[-0.5, 2, "b"]]]


def meta(given: list[Any], **more: Any) -> dict[str, Any]:
    return {"meta_info": {"id": "x", "input_token_logprobs": given, **more}}


def sse(*objects: dict[str, Any]) -> list[bytes]:
    return [b"data: " + json.dumps(one).encode() + b"\n\n" for one in objects] + [b"data: [DONE]\n\n"]


def parsed(stream: bytes) -> list[dict[str, Any]]:
    assert stream.endswith(b"data: [DONE]\n\n")
    return [json.loads(line[6:]) for line in stream.split(b"\n\n")[:-2]]


def test_generate_single() -> None:
    async def check(s: Stack) -> None:
        reply = await s.post("/generate", json={"text": "ab", "return_logprob": True, "logprob_start_len": 0})
        info = reply.json()["meta_info"]
        assert info["input_token_logprobs"] == INPUT
        assert info["input_top_logprobs"] == TOPS
        assert info["output_token_logprobs"] == [[-1.0, 3, "c"]]
        assert int(reply.headers["content-length"]) == len(reply.content)

    receipt = meta(INPUT, input_top_logprobs=TOPS, output_token_logprobs=[[-9.0, 9, "z"]])
    answer = meta([], input_top_logprobs=[], output_token_logprobs=[[-1.0, 3, "c"]])
    for late in (0.0, 0.1):
        with_stack(whole(receipt, delay=late), whole(answer), check)
        with_stack(whole(receipt), whole(answer, delay=late), check)


def test_generate_batch_in_order() -> None:
    async def check(s: Stack) -> None:
        reply = await s.post("/generate", json={"text": ["a", "b"], "return_logprob": [True, True]})
        assert [item["meta_info"]["input_token_logprobs"] for item in reply.json()] == [
            [[-1, 1, "p0"]],
            [[-1, 1, "p1"]],
        ]

    receipt = [meta([[-1, 1, f"p{i}"]]) for i in range(2)]
    with_stack(whole(receipt), whole([meta([]), meta([])]), check)


def test_generate_stream_every_event_that_carries_them() -> None:
    async def check(s: Stack) -> None:
        body = {"text": ["a", "b"], "return_logprob": True, "stream": True}
        got = parsed((await s.post("/generate", json=body)).content)
        assert [(e["index"], e["meta_info"]["input_token_logprobs"]) for e in got] == [
            (1, [[-1, 1, "p1"]]),
            (0, [[-1, 1, "p0"]]),
            (1, [[-1, 1, "p1"]]),
        ]

    receipt = sse(*({**meta([[-1, 1, f"p{i}"]]), "index": i} for i in (1, 0)))
    answer = sse(*({**meta([]), "index": i} for i in (1, 0, 1)))
    with_stack(events(*receipt, delay=0.05), events(*answer, gap=0.01), check)
    joined = b"".join(answer)
    pieces = [joined[i : i + 11] for i in range(0, len(joined), 11)]
    with_stack(events(*receipt), events(*pieces), check)


def columns(tokens: list[str], logprobs: list[float | None]) -> dict[str, Any]:
    offsets = [sum(map(len, tokens[:i])) for i in range(len(tokens))]
    tops = [None if p is None else {t: p} for t, p in zip(tokens, logprobs, strict=True)]
    return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}


def choice(index: int, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs}


PREFILL = columns(["a", "b", "c"], [None, -0.5, -1.0])
BLANK = columns(["a", "b", "c", "d"], [None, None, -1.1, -2.0])
BARE = columns(["c", "d"], [-1.1, -2.0])
FULL = [None, -0.5, -1.1, -2.0]


@pytest.mark.parametrize("decode", [BLANK, BARE], ids=["rows without logprobs", "no rows"])
def test_completions_with_echo(decode: dict[str, Any]) -> None:
    async def check(s: Stack) -> None:
        body = {"prompt": ["ab", "ab"], "echo": True, "logprobs": 1}
        reply = await s.post("/v1/completions", json=body)
        for got in reply.json()["choices"]:
            assert got["logprobs"]["tokens"] == ["a", "b", "c", "d"]
            assert got["logprobs"]["token_logprobs"] == FULL
            assert got["logprobs"]["top_logprobs"][1] == {"b": -0.5}

    receipt = {"choices": [choice(i, "abc", PREFILL) for i in range(2)]}
    answer = {"choices": [choice(i, "abcd", decode) for i in range(2)]}
    with_stack(whole(receipt), whole(answer), check)


def test_completions_with_echo_streamed() -> None:
    async def check(s: Stack) -> None:
        body = {"prompt": "ab", "echo": True, "logprobs": 1, "stream": True}
        got = parsed((await s.post("/v1/completions", json=body)).content)
        rows = [row for e in got for c in e["choices"] if c["logprobs"] for row in c["logprobs"]["token_logprobs"]]
        assert rows == FULL
        assert "".join(c["text"] for e in got for c in e["choices"]) == "abcd"

    prompt = {"choices": [choice(0, "ab", columns(["a", "b"], [None, -0.5]))]}
    receipt = sse(prompt, {"choices": [choice(0, "c", columns(["c"], [-1.0]))]})
    answer = sse(
        {"choices": [choice(0, "ab", columns(["a", "b"], [None, None]))]},
        {"choices": [choice(0, "c", columns(["c"], [-1.1]))]},
        {"choices": [choice(0, "d", columns(["d"], [-2.0]))]},
        {"choices": [], "usage": {}},
    )
    with_stack(events(*receipt, delay=0.03), events(*answer), check)


def test_the_receipt_failing_after_decode_began_is_told() -> None:
    async def check(s: Stack) -> None:
        body = {"text": "a", "return_logprob": True, "stream": True}
        assert (await s.post("/generate", json=body)).status_code == 500

    with_stack(whole({}, 500, delay=0.05), events(*sse(meta([]))), check)


def test_a_large_receipt_is_not_lost() -> None:
    many = [[-0.5, i, None] for i in range(200_000)]

    async def check(s: Stack) -> None:
        reply = await s.post("/generate", json={"text": "a", "return_logprob": True})
        assert reply.json()["meta_info"]["input_token_logprobs"] == many

    with_stack(whole(meta(many)), whole(meta([]), delay=0.2), check)


def test_requests_that_do_not_ask_are_not_parsed() -> None:
    async def check(s: Stack) -> None:
        reply = await s.post("/generate", json={"text": "a", "return_logprob": False})
        assert reply.content == b' { "as" : "it came" } '

    with_stack(whole(meta(INPUT)), whole(b' { "as" : "it came" } '), check)


def test_replies_that_make_no_sense() -> None:
    with pytest.raises(CannotMerge):
        Merger("generate", b"nonsense", stream=False)
    with pytest.raises(CannotMerge):
        Merger("generate", b"{}", stream=False).whole(b"[1, 2]")

    async def check(s: Stack) -> None:
        reply = await s.post("/generate", json={"text": "a", "return_logprob": True})
        assert reply.status_code == 502
        await asyncio.sleep(0)

    with_stack(whole(b"nonsense"), whole(meta([])), check)
