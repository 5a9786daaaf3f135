"""What is seen of a gateway: requests, statistics, metrics, the log, `baton top`."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
from collections.abc import Callable

import pytest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from baton.base.errors import BatonError
from baton.gateway import top
from baton.gateway.accesslog import JsonFormatter
from baton.gateway.metrics import way
from baton.gateway.recorder import KEPT, SAMPLES
from baton.router.split import Decision
from baton.router.target import Target
from tests.gateway.stack import CHAT, RECEIPT, Stack, stack, with_stack
from tests.gateway.test_stages import D, P, attempt, timeline
from tests.router.mocks import Behaviour, Exchange, Mock, hang, reset, run, until, whole

P_SAYS = b"queue;dur=0.010, prefill;dur=0.500, transfer;dur=0.100"
D_SAYS = b"offer;dur=0.010, handoff;dur=0.700, first_token;dur=0.800"
"""Less than it really takes here."""
NOTED = [b'data: {"n":%d}\nid: 0:%d\n\n' % (n, n) for n in range(4)]
END = b"data: [DONE]\nid: 0:!\n\n"
LOADS = {
    "loads": [
        {
            "num_running_reqs": 3,
            "num_waiting_reqs": 2,
            "num_used_tokens": 512,
            "max_total_num_tokens": 2048,
            "gen_throughput": 99.5,
            "disaggregation": {"mode": "decode", "decode_transfer_queue_reqs": 4},
        }
    ]
}


def stream(*pieces: bytes, end: bool = True) -> Behaviour:
    """As our own workers do: with notes to go on from, and with their marks."""

    async def behave(exchange: Exchange) -> None:
        if exchange.path == "/v1/loads":
            exchange.whole(LOADS)
            return
        await asyncio.sleep(0.002)
        exchange.raw(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n"
            b"x-baton-seed: 7\r\nserver-timing: " + D_SAYS + b"\r\n\r\n"
        )
        for piece in pieces:
            exchange.piece(piece)
            await asyncio.sleep(0.002)
        if end:
            exchange.end_stream()
        else:
            exchange.reset()

    return behave


async def receipt(exchange: Exchange) -> None:
    exchange.whole({}, headers=f"server-timing: {P_SAYS.decode()}\r\ncontent-type: application/json\r\n")


async def streamed(s: Stack) -> str:
    """Its id."""
    reply = await s.post(json={"stream": True, "messages": [{"role": "user", "content": "word " * 400}]})
    assert reply.status_code == 200
    assert "[DONE]" in reply.text
    return reply.headers["x-request-id"]


def test_a_request_and_its_picture() -> None:
    async def check(s: Stack) -> None:
        reply = await s.post(json={"stream": True, "messages": [], "model": "<b>m</b>"})
        timing = reply.headers["server-timing"]
        assert timing.startswith(D_SAYS.decode())
        assert re.search(r", gateway_queue;dur=\d+\.\d{3}, route;dur=\d+\.\d{3}, worker;dur=\d+\.\d{3}", timing)
        id = reply.headers["x-request-id"]
        await until(lambda: len(s.gateway.recorder.recent) == 1)
        assert s.gateway.recorder.active == {}
        [row] = (await s.client.get("/requests")).json()["requests"]
        assert (row["id"], row["status"], row["model"], row["stream"]) == (id, 200, "<b>m</b>", True)
        assert row["output_tokens"] == 4
        assert 0 < row["ttft"] <= row["total"]
        await until(lambda: bool(s.gateway.recorder.recent[0].attempts[0].receipt))
        one = (await s.client.get(f"/requests/{id}")).json()
        names = {stage["name"] for stage in one["stages"]}
        assert {"prefill", "transfer", "decode"} <= names
        assert sum(stage["ms"] for stage in one["stages"]) == pytest.approx(one["total"], abs=0.1)
        assert {span["lane"] for span in one["spans"]} == {"gateway", *one["workers"]}
        assert (await s.client.get("/requests/none")).status_code == 404
        assert (await s.client.get("/requests?limit=x")).status_code == 400
        assert (await s.client.get("/requests?limit=0")).json() == {"requests": []}

    with_stack(receipt, stream(*NOTED, END), check, split="always")


def test_those_in_progress_are_seen_too() -> None:
    async def check(s: Stack) -> None:
        task = asyncio.create_task(s.post(headers={"x-request-id": "mine"}))
        await until(lambda: bool(s.decode.seen))
        one = (await s.client.get("/requests/mine")).json()
        assert (one["status"], len(one["tries"])) == (0, 1)
        assert (await s.client.get("/stats")).json()["in_flight"] == 1
        task.cancel()
        await until(lambda: not s.gateway.recorder.active)
        assert (await s.client.get("/requests/mine")).json()["status"] == 499

    with_stack(hang, hang, check)


def test_memory_is_bounded() -> None:
    async def check(s: Stack) -> None:
        recorder = s.gateway.recorder
        for number in range(KEPT + 10):
            one = timeline(attempt(100.003, 100.060, 100.999))
            one.id = str(number)
            recorder.began(one)
            recorder.finished(one)
        assert len(recorder.recent) == KEPT
        assert recorder.active == {}
        assert recorder.find("9") is None
        assert recorder.find(str(KEPT)) is not None
        assert len(recorder._sampled) <= SAMPLES

    with_stack(hang, hang, check)


def test_statistics_are_of_what_happened() -> None:
    async def check(s: Stack) -> None:
        for _ in range(3):
            await streamed(s)
        await s.post(content=b"{")
        await until(lambda: len(s.gateway.recorder.recent) == 4)
        stats = (await s.client.get("/stats")).json()
        assert stats["flow"] == {
            "split": 3, "whole": 0, "running_split": 0, "running_whole": 0, "errors": 0, "retries": 0, "resumes": 0
        }  # fmt: skip
        assert stats["ttft"]["count"] == stats["itl"]["count"] == 3
        assert 0 < stats["ttft"]["p50"] <= stats["ttft"]["p95"] <= stats["ttft"]["p99"]
        assert stats["requests_per_second"] == pytest.approx(4 / 60, abs=0.001)
        assert stats["output_tokens_per_second"] == pytest.approx(12 / 60, abs=0.1)
        assert sum(point["requests"] for point in stats["series"]) == 4
        assert [role["workers"] for role in stats["roles"]] == [1, 1, 0]
        decode = next(worker for worker in stats["workers"] if worker["role"] == "decode")
        assert decode["state"] == "ready"
        assert decode["engine"] == {
            "running": 3, "waiting": 2, "used_tokens": 512, "max_tokens": 2048, "throughput": 99.5,
            "cache_hit_rate": 0.0, "handoffs": 4,
        }  # fmt: skip
        prefill = next(worker for worker in stats["workers"] if worker["role"] == "prefill")
        assert prefill["engine"] == dict.fromkeys(decode["engine"], 0)

    with_stack(receipt, stream(*NOTED, END), check, split="always")


def test_engines_are_asked_once_however_many_look() -> None:
    async def check(s: Stack) -> None:
        await asyncio.gather(*(s.client.get("/stats") for _ in range(8)))
        assert [exchange.path for exchange in s.decode.seen] == ["/v1/loads"]

    with_stack(receipt, stream(), check)


def test_what_is_watched_is_an_admins() -> None:
    async def check(s: Stack) -> None:
        for path in ("/requests", "/requests/x", "/stats"):
            assert (await s.client.get(path)).status_code == 401
            assert (await s.client.get(path, headers={"authorization": "Bearer user"})).status_code == 403
            assert (await s.client.get(path, headers={"authorization": "Bearer boss"})).status_code in (200, 404)
        page = await s.client.get("/dashboard")
        assert page.status_code == 200
        assert "script-src 'sha256-" in page.headers["content-security-policy"]
        assert not re.search(r"""(?:src|href)\\s*=\\s*["'](?!data:)""", page.text)

    with_stack(hang, hang, check, api_key="user", admin_api_key="boss")


def test_speeds_are_learned_from_what_workers_say() -> None:
    async def check(s: Stack) -> None:
        before = s.gateway.router.planner.speeds.costs()
        for _ in range(4):
            await streamed(s)
        await until(lambda: all(one.attempts[0].receipt for one in s.gateway.recorder.recent))
        s.gateway.recorder.digest()
        after = s.gateway.router.planner.speeds.costs()
        assert after.prefill_speed != before.prefill_speed
        assert after.handoff_per_token != before.handoff_per_token

    with_stack(receipt, stream(*NOTED, END), check, split="always")


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (Target(D, P), "split"),
        (Target(D), "whole"),
        (Target(D, P, 0, Decision(True, 9, 1.0, split_seconds=0.5)), "split_faster"),
        (Target(D, None, 0, Decision(False, 9, 1.0, split_seconds=2.0)), "whole_faster"),
        (Target(D, None, 0, Decision(False, 9, 1.0, split_seconds=2.0, threshold=64)), "whole_short"),
        (Target(D, None, 0, Decision(False, 9, 1.0)), "whole_no_prefill"),
    ],
)
def test_ways_are_few_words(target: Target, expected: str) -> None:
    assert way(target) == expected


def test_no_metric_stays_dead() -> None:
    """Everything that is exposed can be driven off zero: what no event moves tells nobody anything."""

    async def main() -> None:
        async with (
            Mock(stream(*NOTED, END), {"version": "baton"}) as other,
            stack(receipt, stream(*NOTED, END), regular=[other], breaker_failures=1, max_inflight_sequences=1) as s,
        ):
            await drive(s, other)

    run(main())


async def drive(s: Stack, other: Mock) -> None:
    alive: set[str] = set()
    names: set[str] = set()

    async def look() -> None:
        for family in text_string_to_metric_families((await s.client.get("/metrics")).text):
            names.add(family.name)
            alive.update(family.name for sample in family.samples if sample.value)

    loop, registry = asyncio.get_running_loop(), s.gateway.router.registry
    for worker in registry.workers:
        worker.runtime = "baton"  # so that others may go on with their streams
    for _ in range(4):
        await streamed(s)
    cut, rest = stream(*NOTED[:2], end=False), stream(*NOTED[2:], END)
    asked: list[Exchange] = []

    async def cut_once(exchange: Exchange) -> None:
        asked.append(exchange)
        await (cut if len(asked) == 1 else rest)(exchange)

    s.decode.behave = other.behave = cut_once
    await streamed(s)
    s.decode.behave = other.behave = reset
    await s.post()  # repeated elsewhere, in vain; breakers open
    await look()
    s.decode.behave = other.behave = hang
    for worker in registry.workers:
        registry.succeeded(worker, loop.time())
    tasks = [asyncio.create_task(s.post()) for _ in range(3)]
    await until(lambda: s.gateway.turnstile.admission.waiting == 1)
    await look()
    for task in tasks:
        task.cancel()
    await until(lambda: s.gateway.metrics.cancelled == 3)
    await look()
    await s.settled()
    assert names - alive == set()
    assert len(names) > 20


def test_labels_do_not_grow_with_what_clients_say() -> None:
    async def check(s: Stack) -> None:
        for number in range(5):
            await s.post(f"/v1/anything/{number}", json={"model": f"m{number}"})
        text = (await s.client.get("/metrics")).text
        assert "anything" not in text
        assert "m3" not in text

    with_stack(RECEIPT, whole({}), check)


@pytest.fixture
def lines() -> Callable[[], list[dict[str, object]]]:
    """What has been logged of requests, as JSON."""
    found: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(self.format(record))

    handler = Keep()
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("baton.requests")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False

    def read() -> list[dict[str, object]]:
        return [json.loads(line) for line in found]

    return read


def test_a_line_per_request(lines: Callable[[], list[dict[str, object]]]) -> None:
    async def check(s: Stack) -> None:
        body = {"messages": [{"role": "user", "content": "SECRET-PROMPT"}], "model": "a\nb", "stream": True}
        headers = {"authorization": "Bearer SECRET-KEY", "x-request-id": "r1"}
        await s.post(json=body, headers=headers)
        await until(lambda: len(lines()) == 1)
        line = lines()[0]
        entry = line["request"]
        assert isinstance(entry, dict)
        assert (line["level"], entry["id"], entry["status"], entry["model"]) == ("info", "r1", 200, "a b")
        assert entry["workers"] == [w.name for w in s.gateway.router.registry.workers]
        assert sum(entry["stages"].values()) == pytest.approx(entry["total"], abs=0.2)
        assert "SECRET" not in json.dumps(lines())

    with_stack(receipt, stream(*NOTED, END), check, request_log="all", split="always")


def test_only_what_went_wrong(lines: Callable[[], list[dict[str, object]]]) -> None:
    async def check(s: Stack) -> None:
        await s.post()
        await s.post(content=b"{")
        s.decode.behave = reset
        await s.post()
        await until(lambda: len(lines()) == 1)
        entry = lines()[0]["request"]
        assert isinstance(entry, dict)
        assert lines()[0]["level"] == "warning"
        assert entry["status"] == 502
        assert entry["error"]
        assert entry["lost"]

    with_stack(RECEIPT, whole({}), check)


def test_top_prints_a_picture_once() -> None:
    async def check(s: Stack) -> None:
        id = await streamed(s)
        await until(lambda: len(s.gateway.recorder.recent) == 1)
        out = Console(file=io.StringIO(), width=180)
        assert await asyncio.to_thread(top.run, s.url, "boss", once=True, interval=1.0, console=out) == 0
        text = out.file.getvalue()  # type: ignore[attr-defined]
        for worker in s.gateway.router.registry.workers:
            assert worker.name in text
        assert id[:8] in text
        assert "time to first token" in text
        assert CHAT.removeprefix("/v1/") in text
        with pytest.raises(BatonError, match="admin's key"):
            await asyncio.to_thread(top.run, s.url, "user", once=True, interval=1.0, console=out)

    async def keyed(s: Stack) -> None:
        s.client.headers["authorization"] = "Bearer boss"
        await check(s)

    with_stack(receipt, stream(*NOTED, END), keyed, api_key="user", admin_api_key="boss")


def test_top_says_what_is_wrong() -> None:
    with pytest.raises(BatonError, match="does not answer"):
        top.run("http://127.0.0.1:1", "", once=True, interval=1.0)


def test_sparklines_and_durations() -> None:
    assert top.spark([1.0, None, 8.0, 4.0]) == "▂ █▅"
    assert top.spark([None, None]) == ""
    assert [top.duration(ms) for ms in (0.5, 99.9, 500, 1500)] == ["0.5 ms", "99.9 ms", "500 ms", "1.50 s"]
