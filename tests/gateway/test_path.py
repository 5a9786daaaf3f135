"""The path of a request when all goes well."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest

from baton.base.config import GatewayConfig
from baton.gateway.process import serving
from tests.gateway.stack import CHAT, RECEIPT, Stack, meeting, stack, with_stack
from tests.router.mocks import Exchange, Mock, events, hang, run, until, whole

HEAD = b'data: {"id":"1","object":"chat.completion.chunk","created":1,"model":"m",'
DONE = b"data: [DONE]\n\n"
CHUNKS = [HEAD + b'"choices":[{"index":0,"delta":{"content":"%d "},"finish_reason":null}]}\n\n' % i for i in range(20)]
DONE = b"data: [DONE]\n\n"


def test_both_legs_get_the_same_request_with_one_room() -> None:
    async def check(s: Stack) -> None:
        body = b'{ "messages" : [{"role":"user","content":"h\\u00e9"}], "x_unknown": 1.50 }'
        headers = {"content-type": "application/json", "x-request-id": "r-1", "x-data-parallel-rank": "0"}
        reply = await s.post(content=body, headers=headers)
        assert (reply.status_code, reply.json()) == (200, {"answer": 42})
        assert reply.headers["x-request-id"] == "r-1"
        [p], [d] = s.prefill.seen, s.decode.seen
        assert p.body == d.body
        assert d.body.startswith(body[:-2])
        assert d.json["bootstrap_host"] == "127.0.0.1"
        assert d.json["bootstrap_port"] == 8998
        assert 0 < d.json["bootstrap_room"] < 2**63
        for leg in (p, d):
            assert leg.headers["x-request-id"] == "r-1"
            assert leg.headers["x-data-parallel-rank"] == "0"
            assert leg.headers["content-type"] == "application/json"
            assert leg.headers["host"] == f"127.0.0.1:{leg.transport.get_extra_info('sockname')[1]}"

    with_stack(*meeting({}, whole({"answer": 42})), check)


def test_rooms_are_never_used_twice() -> None:
    async def check(s: Stack) -> None:
        await asyncio.gather(*(s.post(json={"messages": [], "n": 2}) for _ in range(20)))
        rooms = [room for leg in s.decode.seen for room in leg.json["bootstrap_room"]]
        assert len(set(rooms)) == 40

    with_stack(*meeting({}, whole({})), check)


def test_the_stream_comes_from_decode_without_waiting_for_the_receipt() -> None:
    async def check(s: Stack) -> None:
        async with s.client.stream("POST", CHAT, json={"stream": True}) as reply:
            assert reply.headers["content-type"].startswith("text/event-stream")
            body = b"".join([part async for part in reply.aiter_raw()])
        assert body == b"".join([*CHUNKS, DONE])
        assert not s.prefill.seen[0].gone.is_set()
        pool = s.gateway.router.registry.find(s.prefill.url).pool
        assert pool.open_connections == pool.idle_connections + 1  # the receipt drains behind the answer
        s.prefill.seen[0].whole({"late": True})

    async def late(exchange: Exchange) -> None:
        await asyncio.sleep(0)

    with_stack(late, events(*CHUNKS, DONE), check)


def test_each_event_is_relayed_when_it_comes() -> None:
    async def check(s: Stack) -> None:
        async with s.client.stream("POST", CHAT, json={"stream": True}) as reply:
            parts = reply.aiter_raw()
            first = await anext(parts)
            assert first == CHUNKS[0]
            s.decode.seen[0].piece(CHUNKS[1])
            assert await anext(parts) == CHUNKS[1]
            s.decode.seen[0].piece(DONE)
            s.decode.seen[0].end_stream()
            assert [part async for part in parts] == [DONE]

    async def decode(exchange: Exchange) -> None:
        exchange.begin_stream()
        exchange.piece(CHUNKS[0])

    with_stack(RECEIPT, decode, check)


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
@pytest.mark.parametrize("separator", [b"\n\n", b"\r\n\r\n"])
def test_streams_in_odd_pieces_arrive_byte_for_byte(size: int, separator: bytes) -> None:
    text = b"".join(chunk[:-2] + separator for chunk in CHUNKS) + b": comment" + separator + b"data: [DONE]"

    async def check(s: Stack) -> None:
        reply = await s.post(json={"stream": True})
        assert reply.content == text

    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    with_stack(RECEIPT, events(*pieces, gap=0.0001 if size > 5 else 0.0), check)


def test_a_large_answer_is_relayed_byte_for_byte() -> None:
    body = bytes(range(256)) * 20_000

    async def decode(exchange: Exchange) -> None:
        exchange.whole(body, headers="content-type: application/octet-stream\r\nx-mine: 1\r\n")

    async def check(s: Stack) -> None:
        reply = await s.post()
        assert reply.content == body
        assert reply.headers["x-mine"] == "1"

    with_stack(RECEIPT, decode, check)


def test_a_hundred_streams_at_once_and_connections_are_reused() -> None:
    async def answer(exchange: Exchange) -> None:
        mine = exchange.json["mine"]
        exchange.begin_stream()
        for i in range(10):
            exchange.piece(b"data: %d-%d\n\n" % (mine, i))
            await asyncio.sleep(0.002)
        exchange.piece(DONE)
        exchange.end_stream()

    async def check(s: Stack) -> None:
        async def one(mine: int) -> None:
            reply = await s.post(json={"stream": True, "mine": mine})
            assert reply.content == b"".join(b"data: %d-%d\n\n" % (mine, i) for i in range(10)) + DONE

        for _ in range(2):
            await asyncio.gather(*(one(i) for i in range(100)))
        assert s.decode.accepted <= 101
        assert len(s.decode.seen) == 200

    limits = {"max_concurrent_requests": 200}
    with_stack(*meeting({}, answer), check, **limits)


def test_the_openai_client() -> None:
    whole_chat = {
        "id": "1", "object": "chat.completion", "created": 1, "model": "m",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }  # fmt: skip

    async def decode(exchange: Exchange) -> None:
        if exchange.path == "/v1/models":
            exchange.whole({"object": "list", "data": [{"id": "m", "object": "model", "created": 1, "owned_by": "b"}]})
        elif exchange.json.get("stream"):
            await events(*CHUNKS, DONE)(exchange)
        elif exchange.json["messages"][0]["content"] == "wrong":
            error = {"message": "no such thing", "type": "invalid_request_error", "param": "messages", "code": None}
            exchange.whole({"error": error}, 400)
        else:
            exchange.whole(whole_chat)

    async def check(s: Stack) -> None:
        async with openai.AsyncOpenAI(base_url=f"{s.url}/v1", api_key="secret", max_retries=0) as client:
            ask: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
            reply = await client.chat.completions.create(**ask)
            assert reply.choices[0].message.content == "hello"
            stream = await client.chat.completions.create(**ask, stream=True)
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            assert text == "".join(f"{i} " for i in range(20))
            assert [model.id async for model in client.models.list()] == ["m"]
            ask["messages"][0]["content"] = "wrong"
            with pytest.raises(openai.BadRequestError, match="no such thing") as error:
                await client.chat.completions.create(**ask)
            assert error.value.param == "messages"
        async with openai.AsyncOpenAI(base_url=f"{s.url}/v1", api_key="other", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError, match="API key"):
                await client.models.list()

    with_stack(RECEIPT, decode, check, api_key="secret")


def test_regular_workers_get_the_body_untouched() -> None:
    async def check(s: Stack) -> None:
        await s.gateway.router.remove(s.gateway.router.registry.find(s.prefill.url))
        reply = await s.post(content=b'{"a":1,"bootstrap_room":7}')
        assert reply.json() == {"whole": 1}

    async def main() -> None:
        async with Mock(whole({"whole": 1})) as worker, stack(hang, hang, regular=[worker]) as s:
            await check(s)
            await s.settled()
            assert worker.seen[0].body == b'{"a":1}'

    run(main())


def test_other_posts_go_to_one_worker() -> None:
    async def check(s: Stack) -> None:
        reply = await s.post("/v1/tokenize?x=1", json={"prompt": "a"})
        assert reply.json() == {"tokens": [1]}
        assert [e.path for e in s.decode.seen] == ["/v1/tokenize?x=1"]
        assert s.prefill.seen == []
        assert "bootstrap_room" not in s.decode.seen[0].json
        await s.post(
            "/v1/audio/transcriptions", content=b"--x\r\n\xff\x00", headers={"content-type": "multipart/form-data"}
        )
        assert s.decode.seen[1].body == b"--x\r\n\xff\x00"
        assert s.decode.seen[1].headers["content-type"] == "multipart/form-data"
        assert (await s.post("/tokenize", json={"prompt": "a"})).json() == {"tokens": [1]}
        assert s.decode.seen[2].path == "/tokenize"

    with_stack(hang, whole({"tokens": [1]}), check)


def test_keys_for_workers_replace_the_clients() -> None:
    async def check(s: Stack) -> None:
        await s.post(headers={"authorization": "Bearer client"})
        assert s.decode.seen[0].headers["authorization"] == "Bearer inner"
        assert s.prefill.seen[0].headers["authorization"] == "Bearer inner"

    with_stack(RECEIPT, whole({}), check, api_key="client", worker_api_key="inner")


def test_bad_request_ids_are_replaced() -> None:
    async def check(s: Stack) -> None:
        reply = await s.post(headers={"x-request-id": "a b" * 100})
        assert len(reply.headers["x-request-id"]) == 32
        assert s.decode.seen[0].headers["x-request-id"] == reply.headers["x-request-id"]

    with_stack(RECEIPT, whole({}), check)


def test_a_client_that_sends_its_body_in_chunks() -> None:
    async def body() -> Any:
        yield b'{"messages":'
        await asyncio.sleep(0.01)
        yield b"[]}"

    async def check(s: Stack) -> None:
        assert (await s.post(content=body())).status_code == 200
        assert s.decode.seen[0].json["messages"] == []

    with_stack(RECEIPT, whole({}), check)


def test_decode_may_answer_headers_long_before_the_first_event() -> None:
    """Nothing is relayed before the first byte of the body, so that prefill's error can still be the answer."""

    async def decode(exchange: Exchange) -> None:
        exchange.begin_stream()
        await exchange.gone.wait()

    async def check(s: Stack) -> None:
        reply = await s.post(json={"stream": True})
        assert (reply.status_code, reply.json()) == (400, {"error": "too long"})

    with_stack(whole({"error": "too long"}, 400, delay=0.05), decode, check)


def test_the_gateway_finishes_what_it_began_before_it_stops() -> None:
    run(_drain())


async def _drain() -> None:
    async with Mock(RECEIPT) as p, Mock(events(*CHUNKS, DONE, gap=0.01)) as d:
        config = GatewayConfig(port=0, drain_timeout=5.0)
        async with httpx.AsyncClient(timeout=10) as client:
            async with serving(config, [(p.url, None)], [d.url], []) as (gateway, _, port):
                await until(lambda: all(w.healthy for w in gateway.router.registry.workers))
                url = f"http://127.0.0.1:{port}{CHAT}"
                task = asyncio.create_task(client.post(url, json={"stream": True}))
                await until(lambda: len(d.seen) == 1)
            reply = await task
    assert reply.content == b"".join([*CHUNKS, DONE])
    assert json.loads(d.seen[0].body)["bootstrap_port"] is None


def test_both_legs_hear_how_long_they_have() -> None:
    async def check(s: Stack) -> None:
        await s.post(headers={"x-request-timeout": "7.5"})
        await s.post()
        await s.post(headers={"x-request-timeout": "3600"})
        for legs in (s.prefill.seen, s.decode.seen):
            said = [float(leg.headers["x-request-timeout"]) for leg in legs]
            assert said == pytest.approx([7.5, 10.0, 10.0], abs=0.5)
            assert all(value <= limit for value, limit in zip(said, (7.5, 10.0, 10.0), strict=True))

    with_stack(*meeting({}, whole({})), check)


def test_a_second_attempt_has_what_the_first_one_left() -> None:
    async def check(s: Stack) -> None:
        reply = await s.post(headers={"x-request-timeout": "5"})
        assert reply.status_code == 200
        first, second = (float(leg.headers["x-request-timeout"]) for leg in s.decode.seen)
        assert 4.0 < second <= first - 0.3 <= 4.7

    async def second_time(exchange: Exchange) -> None:
        first = float(exchange.headers["x-request-timeout"]) > 4.9
        await asyncio.sleep(0.3 if first else 0)
        exchange.whole({}, 502 if first else 200)

    with_stack(RECEIPT, second_time, check)
