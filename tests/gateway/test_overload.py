"""Admission, limits and keys as a client meets them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from baton.gateway.journal import Journal
from tests.gateway.stack import CHAT, RECEIPT, Stack, with_stack
from tests.router.mocks import Behaviour, Exchange, events, hang, until, whole

USAGE = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 7}}


class Valve:
    """A worker that answers when it is told to, and notes the order in which requests came."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.order: list[str] = []

    def behaviour(self) -> Behaviour:
        async def behave(exchange: Exchange) -> None:
            self.order.append(str(exchange.json.get("user", "")))
            await self.open.wait()
            exchange.whole(USAGE)

        return behave


def key_file(tmp_path: Path, text: str) -> str:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    path.chmod(0o600)
    return str(path)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_what_exceeds_the_bound_waits_and_nothing_is_lost() -> None:
    valve = Valve()

    async def check(s: Stack) -> None:
        asked = [asyncio.ensure_future(s.post()) for _ in range(6)]
        admission = s.gateway.turnstile.admission
        await until(lambda: admission.waiting == 4)
        await until(lambda: len(s.decode.seen) == 2)
        valve.open.set()
        assert [reply.status_code for reply in await asyncio.gather(*asked)] == [200] * 6
        assert admission.waiting == admission.used.decode_sequences == admission.used.prefill_requests == 0

    with_stack(RECEIPT, valve.behaviour(), check, max_inflight_sequences=2)


def test_higher_priorities_go_first_and_who_leaves_makes_room() -> None:
    valve = Valve()

    async def check(s: Stack) -> None:
        admission = s.gateway.turnstile.admission
        asked = []
        for number, (user, priority) in enumerate([("first", 0), ("low", 0), ("gone", 5), ("high", 3)]):
            asked.append(asyncio.ensure_future(s.post(json={"user": user, "priority": priority})))
            await until(lambda number=number: admission.waiting == number)  # type: ignore[misc]
            await until(lambda: bool(valve.order))
        asked[2].cancel()
        await until(lambda: admission.waiting == 2)
        valve.open.set()
        await asyncio.gather(*asked, return_exceptions=True)
        assert valve.order == ["first", "high", "low"]

    with_stack(RECEIPT, valve.behaviour(), check, max_inflight_sequences=1)


@pytest.mark.parametrize(
    ("options", "reason"), [({"queue_size": 1}, "would wait"), ({"queue_timeout": 0.3}, "time in the queue")]
)
def test_who_cannot_wait_is_told_when_to_come_back(options: dict[str, float], reason: str) -> None:
    async def check(s: Stack) -> None:
        asked = [asyncio.ensure_future(s.post()) for _ in range(3)]
        done, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        reply = done.pop().result()
        assert reply.status_code == 429
        assert 1 <= int(reply.headers["retry-after"]) <= 60
        assert reason in reply.json()["error"]["message"]
        assert reply.json()["error"]["type"] == "rate_limit_error"
        for one in asked:
            one.cancel()
        await asyncio.gather(*asked, return_exceptions=True)

    with_stack(hang, hang, check, max_inflight_sequences=1, **options)


def test_a_key_has_its_limit_and_is_told_what_is_left(tmp_path: Path) -> None:
    text = """
    [[key]]
    name = "alice"
    key = "sk-alice"
    requests_per_minute = 2
    tokens_per_minute = 100000
    [[key]]
    name = "bob"
    key = "sk-bob"
    """

    async def check(s: Stack) -> None:
        first = await s.post(headers=bearer("sk-alice"))
        assert first.headers["x-ratelimit-limit-requests"] == "2"
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        second = await s.post(headers=bearer("sk-alice"))
        left = int(second.headers["x-ratelimit-remaining-tokens"])
        assert 99_500 < left < 100_000  # of the first, only what it used is gone
        third = await s.post(headers=bearer("sk-alice"))
        assert third.status_code == 429
        assert int(third.headers["retry-after"]) >= 1
        assert (await s.post(headers=bearer("sk-bob"))).status_code == 200
        assert "x-ratelimit-limit-requests" not in (await s.post(headers=bearer("sk-bob"))).headers

    with_stack(RECEIPT, whole(USAGE), check, api_keys=key_file(tmp_path, text))


def test_tokens_of_a_stream_without_usage_are_given_back_too(tmp_path: Path) -> None:
    text = '[[key]]\nname = "a"\nkey = "sk-a"\ntokens_per_minute = 10000\n'

    async def check(s: Stack) -> None:
        body = {"stream": True, "max_tokens": 9000}
        assert (await s.post(json=body, headers=bearer("sk-a"))).status_code == 200
        assert (await s.post(json=body, headers=bearer("sk-a"))).status_code == 200

    pieces = [b"data: {}\nid: 0:%d\n\n" % n for n in range(5)]
    journaled = events(*pieces, b"data: [DONE]\nid: 0:!\n\n", headers="x-baton-seed: 1\r\n")
    with_stack(RECEIPT, journaled, check, api_keys=key_file(tmp_path, text))


def test_users_use_and_admins_manage(tmp_path: Path) -> None:
    async def check(s: Stack) -> None:
        for path in ("/workers", "/flush_cache"):
            refused = await s.client.get(path, headers=bearer("user"))
            assert refused.status_code == 403
            assert "admin" in refused.text
            assert (await s.client.get(path, headers=bearer("boss"))).status_code != 403
        for key in ("user", "boss"):
            assert (await s.post(headers=bearer(key))).status_code == 200
        assert (await s.post(CHAT, headers={"x-api-key": "user"})).status_code == 200
        assert (await s.post()).status_code == 401

    with_stack(RECEIPT, whole(USAGE), check, api_key="user", admin_api_key="boss")


@pytest.mark.parametrize("framing", [b"content-length: 1000000", b"transfer-encoding: chunked"])
def test_without_a_key_no_large_body_is_even_read(framing: bytes) -> None:
    async def check(s: Stack) -> None:
        head = b"POST %b HTTP/1.1\r\nhost: x\r\n%b\r\n" % (CHAT.encode(), framing)
        for key, status in ((b"wrong", b"401"), (b"secret", b"100")):
            reader, writer = await asyncio.open_connection("127.0.0.1", int(s.url.rsplit(":", 1)[1]))
            writer.write(head + b"authorization: Bearer %b\r\nexpect: 100-continue\r\n\r\n" % key)
            assert (await reader.readline()).split()[1] == status
            writer.transport.abort()

    with_stack(RECEIPT, whole(USAGE), check, api_key="secret")


def test_tokens_are_counted_to_the_last_and_failures_cost_nothing(tmp_path: Path) -> None:
    journal = Journal(b"1")
    journal.pieces(b"data: a\nid: 0:15,16;1:7\n\ndata: b\nid: 0:17!;1:!\n\ndata: [DONE]\nid: \n\n")
    assert journal.count == 4
    text = '[[key]]\nname = "a"\nkey = "sk-a"\ntokens_per_minute = 10000\n'

    async def check(s: Stack) -> None:
        body = {"max_tokens": 9000}
        assert (await s.post(json=body, headers=bearer("sk-a"))).status_code == 400
        assert (await s.post(json=body, headers=bearer("sk-a"))).status_code == 400

    with_stack(RECEIPT, whole({"error": "no"}, 400), check, api_keys=key_file(tmp_path, text))
