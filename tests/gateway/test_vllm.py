"""What vLLM's workers are sent, and what clients cannot write there."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from baton.router.registry import Description
from tests.gateway.vllm_stack import CHAT, COMPLETIONS, PROMPT, Pairs, said, with_pairs
from tests.router.mocks import Exchange, until
from tests.router.vllm import (
    Decode,
    answer_to,
)

# --- the exchange


@pytest.mark.parametrize("connector", ["", "nixl", "nixl-push", "mooncake"])
@pytest.mark.parametrize("stream", [False, True])
def test_prefill_then_decode_with_what_prefill_said(connector: str, stream: bool) -> None:
    async def check(s: Pairs) -> None:
        for number in range(3):
            more = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
            await s.served(f"{PROMPT} {number}", max_tokens=9, **more)
        assert (s.ledger.given, s.ledger.taken, s.d.alone) == (3, 3, 0)
        if s.bootstrap:
            assert [exchange.path for exchange in s.bootstrap[0].seen] == ["/query"]

    with_pairs(check, connector)


def test_a_server_in_development_mode_is_known_too() -> None:
    async def check(s: Pairs) -> None:
        d = Decode(s.ledger)
        d.development = True
        async with d:
            worker = s.gateway.router.add(d.url, Description("decode"))
            await until(lambda: worker.healthy)
            assert worker.runtime == s.worker(s.d).runtime == "vllm"
            await s.gateway.router.remove(worker)

    with_pairs(check)


def test_what_each_leg_is_sent() -> None:
    body = (
        b'{"model": "m", "prompt":"abc" , "stream":true, "stream_options":{"include_usage":true}, "max_tokens": 77,'
        b'"max_completion_tokens":88,"min_tokens":3,"n":1,"seed":7, "temperature":1e-1, "x":{"a": [1.0, "\\u00e9"]} }'
    )

    async def check(s: Pairs) -> None:
        headers = {"x-request-id": "my-own", "content-type": "application/json"}
        reply = await s.client.post(COMPLETIONS, content=body, headers=headers)
        assert (reply.status_code, reply.headers["x-request-id"]) == (200, "my-own")
        [first], [second] = s.p.seen, s.d.seen
        asked = first.json
        assert asked.pop("kv_transfer_params")["do_remote_decode"] is True
        assert asked == {
            "model": "m",
            "prompt": "abc",
            "stream": False,
            "max_tokens": 1,
            "max_completion_tokens": 1,
            "min_tokens": 1,
            "n": 1,
            "seed": 7,
            "temperature": 0.1,
            "x": {"a": [1.0, "\u00e9"]},
        }
        kept, _, params = second.body.partition(b',"kv_transfer_params":')
        assert kept + b" }" == body, "the client's own bytes"
        assert b'"unheard_of": {"deeply": [null, 1.5, "\\u00e9"]}' in params, "as prefill wrote it"
        ids = [first.headers["x-request-id"], second.headers["x-request-id"]]
        assert ids[0] == ids[1] != "my-own"
        assert ids[0].startswith("my-own-")

    with_pairs(check)


@pytest.mark.parametrize(
    ("path", "limit"),
    [(CHAT, "max_tokens"), ("/v1/messages", "max_tokens"), ("/v1/responses", "max_output_tokens")],
)
def test_one_token_by_the_name_that_the_route_has_for_it(path: str, limit: str) -> None:
    async def check(s: Pairs) -> None:
        said_first = {"messages": [{"role": "user", "content": "hi"}], "input": "hi"}
        reply = await s.client.post(path, json={**said_first, "store": True, "stream": True})
        assert reply.status_code == 200
        asked = s.p.seen[0].json
        assert (asked[limit], asked["store"]) == (1, False)
        assert {"max_tokens", "max_output_tokens"} & asked.keys() == {limit}
        assert s.d.seen[0].json["store"] is True

    with_pairs(check)


def test_both_workers_are_charged_while_prefill_runs() -> None:
    async def check(s: Pairs) -> None:
        s.p.open.clear()
        task = asyncio.create_task(s.served())
        await until(lambda: bool(s.p.seen))
        assert s.d.seen == []
        assert s.worker(s.d).in_flight == s.worker(s.p).in_flight == 1
        assert s.worker(s.d).load > 0
        s.p.open.set()
        await task

    with_pairs(check)


@pytest.mark.parametrize("connector", ["nixl", "nixl-push", "mooncake"])
@pytest.mark.parametrize(
    "more",
    [
        {"prompt": ["a", "b", "c"]},
        {"prompt": [[1, 2], [3]]},
        {"prompt": "a", "n": 2},
        {"prompt": "a", "echo": True, "logprobs": 1},
        {"prompt": "a", "prompt_logprobs": 0},
        {"prompt": "a", "use_beam_search": True, "n": 2},
        {"prompt": "a", "background": True},
    ],
    ids=lambda more: ",".join(more) + str(more["prompt"]),
)
def test_what_a_pair_cannot_do_goes_whole(connector: str, more: dict[str, Any]) -> None:
    async def check(s: Pairs) -> None:
        reply = await s.client.post(COMPLETIONS, json=more)
        assert said(reply) == answer_to(json.dumps(more["prompt"]))
        assert (s.p.seen, s.d.alone) == ([], 1)
        assert s.d.seen[0].json == more

    with_pairs(check, connector)


def test_a_list_of_one_prompt_is_one_prompt() -> None:
    async def check(s: Pairs) -> None:
        for prompt in (["a"], [1, 2, 3], [[1, 2, 3]]):
            await s.served(prompt, n=1)
        assert s.ledger.taken == 3

    with_pairs(check)


# --- what prefill says


@pytest.mark.parametrize(
    "edit",
    [
        lambda params: None,
        lambda params: {},
        lambda params: "params",
        lambda params: {**params, "do_remote_prefill": False},
        lambda params: {**params, "remote_port": "5600"},
        lambda params: {**params, "remote_block_ids": []},
        lambda params: {**params, "remote_block_ids": [[], []]},
        *(
            lambda params, name=name: {key: value for key, value in params.items() if key != name}
            for name in ("remote_engine_id", "remote_request_id", "remote_host", "remote_port", "remote_block_ids")
        ),
    ],
)
def test_parameters_that_are_not_whole_are_not_passed_on(edit: Callable[[dict[str, Any]], Any]) -> None:
    async def check(s: Pairs) -> None:
        s.p.edit = edit
        await s.served()
        await s.served(stream=True)
        assert (s.d.alone, s.worker(s.p).errors) == (2, {"no_kv_params": 2})
        assert s.worker(s.p).healthy
        assert all("kv_transfer_params" not in exchange.json for exchange in s.d.seen)

    with_pairs(check, left=2)


def test_mooncake_keeps_nothing_of_an_answer_that_ended_by_itself() -> None:
    async def check(s: Pairs) -> None:
        s.p.finish = "stop"
        await s.served()
        assert s.d.alone == 1

    with_pairs(check, "mooncake")


# --- what clients write


KILL = json.dumps({"do_remote_prefill": True})
WRITTEN = {
    "once": f'"kv_transfer_params":{KILL}',
    "twice": f'"kv_transfer_params":{{}},"kv_transfer_params":{KILL}',
    "escaped": f'"kv\\u005ftransfer_params":{KILL}',
    "no object": '"kv_transfer_params":"x"',
    "smuggled": '"vllm_xargs":{"kv_transfer_params":"x"}',
    "smuggled, escaped": '"vllm_xargs":{"kv\\u005ftransfer_params":"x"}',
}


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/v1/responses", "/v1/messages", "/v1/embeddings", "/v1/other"])
@pytest.mark.parametrize("written", WRITTEN.values(), ids=WRITTEN.keys())
def test_a_client_cannot_write_kv_transfer_params(path: str, written: str) -> None:
    async def check(s: Pairs) -> None:
        for start in ('{"prompt":"a",', '{"prompt":["a","b"],'):
            body = start + written + ',"input":"b"}'
            reply = await s.client.post(path, content=body, headers={"content-type": "application/json"})
            assert reply.status_code == 200
        for exchange in (*s.p.seen, *s.d.seen):
            params = exchange.json.get("kv_transfer_params") or {}
            assert params in ({},) or params.get("do_remote_decode") or params.get("remote_engine_id") == s.p.engine
            assert "kv_transfer_params" not in exchange.json.get("vllm_xargs", {})

    with_pairs(check)


@pytest.mark.parametrize("xargs", ['{"a": "b\\n\\u00e9"}', '{"b": "kv_transfer_params"}', "{}"])
def test_other_extra_arguments_pass(xargs: str) -> None:
    async def check(s: Pairs) -> None:
        reply = await s.client.post(COMPLETIONS, content=f'{{"prompt":"a","vllm_xargs":{xargs}}}')
        assert reply.status_code == 200
        assert s.p.seen[0].json["vllm_xargs"] == s.d.seen[0].json["vllm_xargs"] == json.loads(xargs)

    with_pairs(check)


@pytest.mark.parametrize("path", [CHAT, "/v1/embeddings"])
@pytest.mark.parametrize(
    "body",
    [
        f'{{"a":NaN,"kv_transfer_params":{KILL}}}'.encode(),
        f'{{"a":1,"kv_transfer_params":{KILL}}}'.encode("utf-16"),
        f'{{"a":1,"kv_transfer_params":{KILL}}}'.encode("utf-16-be"),
        f'{{"a":1,"kv_transfer_params":{KILL}}}'.encode("utf-32-le"),
        f'{{"a":1,"kv_transfer_params":{KILL}}}'.encode("utf-8-sig"),
    ],
    ids=["NaN", "UTF-16", "UTF-16-BE", "UTF-32-LE", "BOM"],
)
def test_what_a_lenient_parser_would_read_is_refused(path: str, body: bytes) -> None:
    """Python's parser, which vLLM has, takes all of these."""
    assert json.loads(body)["kv_transfer_params"]

    async def check(s: Pairs) -> None:
        reply = await s.client.post(path, content=body, headers={"content-type": "application/json"})
        assert reply.status_code == 400
        assert s.p.seen == s.d.seen == []

    with_pairs(check)


def test_a_body_that_is_no_json_passes() -> None:
    async def check(s: Pairs) -> None:
        body = b'--x\r\ncontent-disposition: form-data; name="file"\r\n\r\n\x00\\u kv_transfer_params {\r\n--x--\r\n'
        got: list[bytes] = []

        async def behave(exchange: Exchange) -> None:
            got.append(exchange.body)
            exchange.whole({})

        s.d.behave = behave
        reply = await s.client.post(
            "/v1/audio/transcriptions", content=body, headers={"content-type": "multipart/form-data; boundary=x"}
        )
        assert (reply.status_code, got) == (200, [body])

    with_pairs(check)
