"""What goes wrong, and what the client, the peers and the books see of it."""

from __future__ import annotations

import asyncio
import json
import time

import httpx
import openai
import pytest

from baton.router.registry import Description
from tests.gateway.stack import CHAT, RECEIPT, Stack, stack, with_stack
from tests.router.mocks import (
    Behaviour,
    Exchange,
    Mock,
    events,
    garbage,
    hang,
    reset,
    run,
    stream_then_hang,
    stream_then_reset,
    until,
    whole,
)

STREAM = {"stream": True}


def error_of(reply: httpx.Response) -> dict[str, object]:
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return dict(error)


@pytest.mark.parametrize("body", [{"messages": []}, STREAM], ids=["whole", "stream"])
@pytest.mark.parametrize("failing", ["prefill", "decode"])
@pytest.mark.parametrize("broken", [reset, garbage], ids=["reset", "garbage"])
def test_a_leg_that_dies_is_a_502_and_the_other_is_cancelled(
    body: dict[str, object], failing: str, broken: Behaviour
) -> None:
    async def check(s: Stack) -> None:
        started = time.perf_counter()
        reply = await s.post(json=body)
        assert time.perf_counter() - started < 2
        assert reply.status_code == 502
        error = error_of(reply)
        assert error["code"] == "worker_failed"
        message = str(error["message"])
        assert message.startswith(f"{failing}-")
        assert "127.0.0.1" not in message
        for other in (s.decode if failing == "prefill" else s.prefill).seen:
            await asyncio.wait_for(other.gone.wait(), 1)

    legs = (broken, hang) if failing == "prefill" else (hang, broken)
    with_stack(*legs, check)


@pytest.mark.parametrize("failing", ["prefill", "decode"])
@pytest.mark.parametrize("status", [400, 404, 422, 500, 501])
def test_a_workers_own_error_passes_as_it_is(failing: str, status: int) -> None:
    said = {"error": {"message": "as I said", "type": "x", "param": "p", "code": "c"}}

    async def check(s: Stack) -> None:
        reply = await s.post(json=STREAM)
        assert (reply.status_code, reply.json()) == (status, said)
        assert reply.headers["content-type"] == "application/json"
        assert reply.headers["x-request-id"]
        [other] = (s.decode if failing == "prefill" else s.prefill).seen
        await asyncio.wait_for(other.gone.wait(), 1)
        assert len(s.prefill.seen) == len(s.decode.seen) == 1

    broken = whole(said, status, delay=0.02)
    with_stack(*((broken, hang) if failing == "prefill" else (hang, broken)), check)


@pytest.mark.parametrize("failing", ["prefill", "decode"])
def test_an_error_whose_body_comes_after_its_head(failing: str) -> None:
    async def broken(exchange: Exchange) -> None:
        exchange.raw(b"HTTP/1.1 400 X\r\ncontent-type: application/json\r\ncontent-length: 15\r\n\r\n")
        await asyncio.sleep(0.03)
        exchange.raw(b'{"error": "no"}')

    async def check(s: Stack) -> None:
        started = time.perf_counter()
        reply = await s.post("/generate", json={"text": "a"})
        assert (reply.status_code, reply.json()) == (400, {"error": "no"})
        assert time.perf_counter() - started < 1

    with_stack(*((broken, hang) if failing == "prefill" else (hang, broken)), check)


def test_an_error_inside_the_receipts_stream_is_found() -> None:
    event = b'data: {"error":{"message":"gone wrong","code":500}}\n\ndata: [DONE]\n\n'

    async def check(s: Stack) -> None:
        reply = await s.post(json=STREAM)
        assert reply.content == event
        await asyncio.wait_for(s.decode.seen[0].gone.wait(), 1)

    with_stack(events(event), hang, check)


def test_an_error_message_that_never_ends() -> None:
    async def endless(exchange: Exchange) -> None:
        exchange.raw(b"HTTP/1.1 400 X\r\ncontent-length: 100\r\n\r\n{")
        await exchange.gone.wait()

    async def check(s: Stack) -> None:
        reply = await s.post()
        assert reply.status_code == 504

    with_stack(endless, hang, check)


def test_prefill_failing_after_decode_has_begun_is_decodes_to_tell() -> None:
    async def prefill(exchange: Exchange) -> None:
        await asyncio.sleep(0.05)
        exchange.whole({"error": "late"}, 500)

    async def check(s: Stack) -> None:
        reply = await s.post(json=STREAM)
        assert reply.content == b"".join(stream)

    stream = [*(b"data: %d\n\n" % i for i in range(10)), b"data: [DONE]\n\n"]
    with_stack(prefill, events(*stream, gap=0.02), check)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/generate"])
def test_a_stream_that_ends_without_its_end_is_not_passed_on_as_a_whole(path: str) -> None:
    """HTTP is content: the last chunk came. The client must not be."""

    async def check(s: Stack) -> None:
        reply = await s.post(path, json=STREAM)
        parts = reply.content.split(b"\n\n")
        assert parts[0] == b"data: {}"
        assert json.loads(parts[1][6:])["error"]["code"] == "worker_failed"
        assert parts[2:] == [b"data: [DONE]", b""]

    with_stack(RECEIPT, events(b"data: {}\n\n"), check)


@pytest.mark.parametrize("failing", ["prefill", "decode"])
@pytest.mark.parametrize("said", [b"<html>It works!</html>", b'{"choices": [', b""])
def test_an_answer_that_is_no_answer_is_a_failure(failing: str, said: bytes) -> None:
    async def check(s: Stack) -> None:
        reply = await s.post()
        assert reply.status_code == 502
        assert "not, or not all of, what was asked for" in str(error_of(reply)["message"])

    with_stack(*((whole(said), hang) if failing == "prefill" else (RECEIPT, whole(said))), check)


def test_a_disconnect_cancels_both_legs_within_a_second() -> None:
    async def check(s: Stack) -> None:
        for path, body in ((CHAT, STREAM), ("/generate", {"text": "a"}), ("/v1/tokenize", {})):
            task = asyncio.create_task(s.post(path, json=body))
            await until(lambda: bool(s.decode.seen))
            await asyncio.sleep(0.02)
            task.cancel()
            legs = [*s.decode.seen, *s.prefill.seen]
            await asyncio.wait_for(asyncio.gather(*(leg.gone.wait() for leg in legs)), 1)
            await s.settled()
            s.decode.seen.clear()
            s.prefill.seen.clear()
        assert s.gateway.metrics.cancelled == 3

    with_stack(hang, hang, check)


def test_a_disconnect_in_the_middle_of_a_stream_cancels_both_legs() -> None:
    async def check(s: Stack) -> None:
        async with s.client.stream("POST", CHAT, json=STREAM) as reply:
            await anext(reply.aiter_raw())
        legs = [*s.decode.seen, *s.prefill.seen]
        await asyncio.wait_for(asyncio.gather(*(leg.gone.wait() for leg in legs)), 1)

    with_stack(hang, stream_then_hang, check)


def test_a_disconnect_never_disturbs_the_next_request() -> None:
    async def decode(exchange: Exchange) -> None:
        await asyncio.sleep(0.01)
        exchange.whole({"mine": exchange.json["mine"]})

    async def check(s: Stack) -> None:
        async def impatient(mine: int) -> None:
            try:
                reply = await asyncio.wait_for(s.post(json={"mine": mine}), 0.001 * (mine % 25))
            except TimeoutError:
                return
            assert reply.json() == {"mine": mine}

        await asyncio.gather(*(impatient(mine) for mine in range(100)))
        assert (await s.post(json={"mine": -1})).json() == {"mine": -1}

    with_stack(RECEIPT, decode, check)


def test_decode_dying_in_the_middle_of_a_stream_is_an_error_event_and_an_end() -> None:
    async def check(s: Stack) -> None:
        reply = await s.post(json=STREAM)
        parts = reply.content.split(b"\n\n")
        assert parts[0] == b'data: {"n":0}'
        assert json.loads(parts[1][6:])["error"]["code"] == "worker_failed"
        assert parts[2:] == [b"data: [DONE]", b""]
        async with openai.AsyncOpenAI(base_url=f"{s.url}/v1", api_key="x", max_retries=0) as client:
            with pytest.raises(openai.APIError, match="lost in the middle"):
                async for _ in await client.chat.completions.create(model="m", messages=[], stream=True):
                    pass

    with_stack(RECEIPT, stream_then_reset, check, breaker_failures=10)


def test_a_broken_large_answer_is_broken_for_the_client_too() -> None:
    async def decode(exchange: Exchange) -> None:
        exchange.raw(b"HTTP/1.1 200 OK\r\ncontent-length: 9000000\r\n\r\n" + b"x" * 4_000_000)
        await asyncio.sleep(0.05)
        exchange.reset()

    async def check(s: Stack) -> None:
        with pytest.raises(httpx.RemoteProtocolError):
            await s.post()

    with_stack(RECEIPT, decode, check)


def test_a_truncated_answer_is_a_502() -> None:
    async def decode(exchange: Exchange) -> None:
        exchange.raw(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{")
        await asyncio.sleep(0.01)
        exchange.reset()

    async def check(s: Stack) -> None:
        assert (await s.post()).status_code == 502

    with_stack(RECEIPT, decode, check)


@pytest.mark.parametrize("path", [CHAT, "/generate"])
def test_deadlines(path: str) -> None:
    async def check(s: Stack) -> None:
        reply = await s.post(path)
        assert reply.status_code == 504
        assert "not finished within 0.2 s" in reply.text
        for leg in (*s.prefill.seen, *s.decode.seen):
            await asyncio.wait_for(leg.gone.wait(), 1)

    with_stack(hang, hang, check, request_timeout=0.2)


@pytest.mark.parametrize("path", [CHAT, "/generate"])
def test_the_clients_own_deadline(path: str) -> None:
    async def check(s: Stack) -> None:
        reply = await s.post(path, headers={"x-request-timeout": "0.2"})
        assert reply.status_code == 504
        assert "not finished within 0.2 s" in reply.text
        for leg in (*s.prefill.seen, *s.decode.seen):
            await asyncio.wait_for(leg.gone.wait(), 1)
        refused = await s.post(path, headers={"x-request-timeout": "soon"})
        assert refused.status_code == 400
        assert "x-request-timeout is 'soon'" in refused.text
        assert len(s.decode.seen) == 1

    with_stack(hang, hang, check)


def test_a_stream_that_stalls_is_ended_with_an_error_event() -> None:
    async def check(s: Stack) -> None:
        reply = await s.post(json=STREAM)
        assert reply.status_code == 200
        assert b"sent nothing for 0.2 s" in reply.content
        assert reply.content.endswith(b"data: [DONE]\n\n")
        await asyncio.wait_for(s.decode.seen[0].gone.wait(), 1)

    with_stack(RECEIPT, stream_then_hang, check, stall_timeout=0.2)


# --- a second attempt


def pool_of(first: Behaviour, second: Behaviour) -> Behaviour:
    """Behave like `first` for the first request, then like `second`."""
    turns = iter([first])

    async def behave(exchange: Exchange) -> None:
        await next(turns, second)(exchange)

    return behave


@pytest.mark.parametrize("status", [502, 503])
def test_another_decode_gets_the_request_with_a_new_room(status: int) -> None:
    async def main() -> None:
        async with Mock(whole({"ok": 1})) as spare, stack(RECEIPT, whole({"error": "no"}, status)) as s:
            added = s.gateway.router.add(spare.url, Description("decode"))
            await until(lambda: added.healthy)
            for _ in range(4):
                assert (await s.post()).json() == {"ok": 1}
            assert len(spare.seen) == 4
            assert s.gateway.metrics.retries == len(s.decode.seen) > 0
            rooms = [e.json["bootstrap_room"] for e in (*s.decode.seen, *spare.seen)]
            assert len(set(rooms)) == len(rooms)
            await s.settled()

    run(main())


def test_a_dead_worker_costs_no_request_while_another_lives() -> None:
    async def main() -> None:
        async with Mock(whole({"ok": 1})) as spare, stack(RECEIPT, whole({"ok": 0})) as s:
            added = s.gateway.router.add(spare.url, Description("decode"))
            await until(lambda: added.healthy)
            await s.decode.stop()
            replies = await asyncio.gather(*(s.post() for _ in range(20)))
            assert [r.status_code for r in replies] == [200] * 20
            dead = s.gateway.router.registry.find(s.decode.url)
            await until(lambda: not dead.healthy)
            await s.decode.start()
            await until(lambda: dead.healthy)  # comes back by itself
            await asyncio.gather(*(s.post() for _ in range(4)))
            assert s.decode.seen
            await s.settled()

    run(main())


def test_no_second_attempt_for_the_clients_own_errors() -> None:
    async def check(s: Stack) -> None:
        assert (await s.post()).status_code == 400
        assert len(s.decode.seen) == 1
        assert s.gateway.metrics.retries == 0

    with_stack(hang, whole({"error": "bad"}, 400), check)


def test_a_lost_handoff_is_tried_again_between_the_same_two() -> None:
    async def check(s: Stack) -> None:
        assert (await s.post()).json() == {"ok": 1}
        assert len({e.json["bootstrap_room"] for e in s.decode.seen}) == 2

    with_stack(RECEIPT, pool_of(whole({"error": "lost"}, 502), whole({"ok": 1})), check)


def test_a_stale_connection_is_nobodys_fault() -> None:
    async def check(s: Stack) -> None:
        assert (await s.post()).json() == {"ok": 1}
        assert (await s.post()).json() == {"ok": 2}
        assert s.gateway.router.registry.find(s.decode.url).errors == {}

    answers = [whole({"ok": 1}), reset]

    async def decode(exchange: Exchange) -> None:
        await (answers.pop(0) if answers else whole({"ok": 2}))(exchange)

    with_stack(RECEIPT, decode, check, retries=0)


def test_failures_open_the_breaker_and_the_reason_is_told() -> None:
    async def check(s: Stack) -> None:
        for _ in range(3):
            assert (await s.post()).status_code == 500
        reply = await s.post()
        assert reply.status_code == 503
        assert reply.headers["retry-after"] == "1"
        assert "has failed 3 times in a row" in str(error_of(reply)["message"])
        s.decode.behave = whole({"ok": 1})
        await asyncio.sleep(1.05)
        assert (await s.post()).json() == {"ok": 1}
        assert len(s.decode.seen) == 4

    with_stack(RECEIPT, whole({"error": "sick"}, 500), check)


# --- at the door


def test_bad_bodies() -> None:
    async def check(s: Stack) -> None:
        for body in (b"", b"{", b"[1]", b'{"a":\xff', b'{"n":100000}'):
            reply = await s.post(content=body)
            assert reply.status_code == 400
            assert error_of(reply)["type"] == "invalid_request_error"
        reply = await s.post("/generate", content=b"{")
        assert reply.status_code == 400
        assert isinstance(reply.json()["error"], str)
        assert s.decode.seen == []

    with_stack(hang, hang, check)


@pytest.mark.parametrize("chunked", [False, True])
def test_bodies_that_are_too_large(chunked: bool) -> None:
    async def pieces() -> object:
        for _ in range(40):
            yield b" " * 65536  # type: ignore[misc]

    async def check(s: Stack) -> None:
        reply = await s.post(content=pieces() if chunked else b" " * 40 * 65536)
        assert reply.status_code == 413
        assert (await s.post()).status_code == 200

    with_stack(RECEIPT, whole({}), check, max_body_mb=1.0)


def test_one_request_too_many_is_told_to_come_back() -> None:
    async def check(s: Stack) -> None:
        tasks = [asyncio.create_task(s.post()) for _ in range(2)]
        await until(lambda: len(s.decode.seen) == 2)
        reply = await s.post()
        assert reply.status_code == 429
        assert reply.headers["retry-after"] == "1"
        assert error_of(reply)["type"] == "rate_limit_error"
        for leg in (*s.decode.seen, *s.prefill.seen):
            leg.whole({})
        assert [(await task).status_code for task in tasks] == [200, 200]

    async def later(exchange: Exchange) -> None:
        pass

    with_stack(later, later, check, max_concurrent_requests=2)


def test_without_workers() -> None:
    async def main() -> None:
        async with stack(hang, hang, ready=False) as s:
            for worker in s.gateway.router.registry.workers:
                await s.gateway.router.remove(worker)
            reply = await s.post()
            assert reply.status_code == 503
            assert reply.headers["retry-after"] == "1"
            assert "no workers are registered" in str(error_of(reply)["message"])
            assert "no workers" in (await s.post("/generate")).json()["error"]

    run(main())


def test_a_client_that_does_not_read_is_cut_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baton.gateway.deadlines.GRACE_SECONDS", 0.2)

    async def flood(exchange: Exchange) -> None:
        exchange.begin_stream()
        while not exchange.gone.is_set():
            if not exchange.transport.get_write_buffer_size():
                exchange.piece(b"data: " + b"x" * 60000 + b"\n\n")
            await asyncio.sleep(0.001)

    async def check(s: Stack) -> None:
        port = int(s.url.rsplit(":", 1)[1])
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        writer.write(b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: 15\r\n\r\n" % CHAT.encode() + b'{"stream":true}')
        await until(lambda: bool(s.decode.seen))
        await asyncio.wait_for(s.decode.seen[0].gone.wait(), 3)
        writer.transport.abort()
        assert reader is not None

    with_stack(RECEIPT, flood, check, request_timeout=0.5)
