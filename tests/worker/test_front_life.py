"""Clients that leave, engines that die, keys, draining, many at once."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import httpx
import pytest

from .rig import MODEL, Rig, paced, raw_connection, serving, wait_for

LONG = {"prompt": "hello there", "max_tokens": 900, "ignore_eos": True}


def in_background(call: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    results: list[object] = []

    def run() -> None:
        try:
            results.append(call())
        except httpx.HTTPError as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


def test_tokens_come_one_by_one(rig: Rig) -> None:
    """Each token is there before the next one is computed."""
    body = {"prompt": "hello", "max_tokens": 8, "stream": True}
    arrivals = []
    with paced(rig, 0.05), httpx.stream("POST", f"{rig.url}/v1/completions", json=body, timeout=10) as response:
        arrivals = [time.monotonic() for line in response.iter_lines() if '"text":"' in line and '""' not in line]
    gaps = [later - earlier for earlier, later in pairwise(arrivals)]
    assert len(arrivals) == 8
    assert min(gaps[:-1]) > 0.02


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_request(rig: Rig, stream: bool) -> None:
    with paced(rig, 0.01):
        with pytest.raises(httpx.ReadTimeout):
            read_for(rig, 0.2) if stream else httpx.post(f"{rig.url}/v1/completions", json=LONG, timeout=0.2)
        started = time.monotonic()
        rig.settle()
        assert time.monotonic() - started < 1.0
    left = [key for key in rig.front.state.metrics.requests if key == ("completions", "disconnect")]
    assert left


def read_for(rig: Rig, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    with httpx.stream("POST", f"{rig.url}/v1/completions", json={**LONG, "stream": True}, timeout=5) as response:
        for _ in response.iter_lines():
            if time.monotonic() > deadline:
                raise httpx.ReadTimeout("enough")


@pytest.mark.parametrize("count", [20])
def test_leaving_at_any_moment(rig: Rig, count: int) -> None:
    def leave(number: int) -> None:
        with raw_connection(rig) as connection:
            body = json.dumps({**LONG, "stream": number % 2 == 0, "n": 1 + number % 3}).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            time.sleep(0.005 * number)

    with paced(rig, 0.003), ThreadPoolExecutor(8) as pool:
        list(pool.map(leave, range(count)))
        rig.settle()


def test_the_engine_dies_before_the_first_token(fresh: Rig) -> None:
    engine = fresh.engine
    assert engine is not None
    engine.hung.set()
    thread, results = in_background(lambda: httpx.post(f"{fresh.url}/v1/completions", json=LONG, timeout=10))
    wait_for(lambda: fresh.front.state.client.open_count)
    started = time.monotonic()
    engine.kill()
    thread.join(5)
    assert time.monotonic() - started < 2.0
    response = results[0]
    assert isinstance(response, httpx.Response)
    assert response.status_code == 503
    assert response.headers["retry-after"]
    error = response.json()["error"]
    assert error["code"] == "unavailable"
    assert error["retryable"] is True


def test_the_engine_dies_in_a_stream_and_comes_back(fresh: Rig) -> None:
    assert fresh.engine is not None
    fresh.engine.runner.pace = 0.01
    lines: list[str] = []
    with httpx.stream("POST", f"{fresh.url}/generate", json={
        "text": "hello there", "stream": True, "sampling_params": {"max_new_tokens": 900, "ignore_eos": True},
    }, timeout=10) as response:  # fmt: skip
        assert response.status_code == 200
        for line in response.iter_lines():
            if len(lines) == 6:
                fresh.engine.kill()
            if line:
                lines.append(line)
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[-2][6:])["error"]["code"] == "unavailable"
    assert httpx.get(f"{fresh.url}/health", timeout=5).status_code == 503
    assert httpx.get(f"{fresh.url}/ready", timeout=5).status_code == 503
    refused = httpx.post(f"{fresh.url}/v1/completions", json=LONG, timeout=5)
    assert refused.status_code == 503
    assert "restarted" in refused.json()["error"]["message"]
    fresh.start_engine()
    assert httpx.get(f"{fresh.url}/health", timeout=5).status_code == 200
    assert httpx.post(f"{fresh.url}/v1/completions", json=LONG, timeout=10).status_code == 200
    fresh.settle()


def test_a_second_engine_takes_over(fresh: Rig) -> None:
    first = fresh.engine
    assert first is not None
    fresh.start_engine()
    wait_for(lambda: not first.thread.is_alive())
    assert httpx.post(f"{fresh.url}/v1/completions", json={**LONG, "max_tokens": 3}, timeout=10).status_code == 200


def test_a_hung_engine_is_not_healthy(fresh: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baton.worker.client.FRESH", 0.05)
    monkeypatch.setattr("baton.worker.routes_info.HEALTH_TIMEOUT", 0.2)
    assert httpx.get(f"{fresh.url}/health", timeout=5).status_code == 200
    assert fresh.engine is not None
    fresh.engine.hung.set()
    time.sleep(0.1)
    assert httpx.get(f"{fresh.url}/health", timeout=5).status_code == 503
    assert httpx.get(f"{fresh.url}/ready", timeout=5).status_code == 200
    fresh.engine.hung.clear()
    wait_for(lambda: httpx.get(f"{fresh.url}/health", timeout=5).status_code == 200)


def test_nobody_waits_for_ever_for_a_hung_engine(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baton.worker.client.FRESH", 0.05)
    monkeypatch.setattr("baton.worker.front.SILENCE", 0.3)
    monkeypatch.setattr("baton.worker.front.WATCH", 0.05)
    with serving(model_dir, tmp_path) as rig:
        assert rig.engine is not None
        rig.engine.hung.set()
        response = httpx.post(f"{rig.url}/v1/completions", json=LONG, timeout=5)
        assert response.status_code == 503
        assert "not answered" in response.json()["error"]["message"]
        rig.engine.hung.clear()
        rig.settle()


def test_before_the_engine_is_there(model_dir: Path, tmp_path: Path) -> None:
    with serving(model_dir, tmp_path, engine=False) as rig:
        for path in ("/health", "/ready", "/v1/loads"):
            assert httpx.get(f"{rig.url}{path}", timeout=5).status_code == 503
        response = httpx.post(f"{rig.url}/v1/completions", json=LONG, timeout=5)
        assert response.status_code == 503
        assert "starting" in response.json()["error"]["message"]
        assert httpx.get(f"{rig.url}/v1/models", timeout=5).json()["data"][0]["id"] == MODEL
        assert httpx.get(f"{rig.url}/server_info", timeout=5).json()["status"] == "starting"
        assert "baton_engine_up" in httpx.get(f"{rig.url}/metrics", timeout=5).text


def test_the_key(model_dir: Path, tmp_path: Path) -> None:
    with serving(model_dir, tmp_path, api_key="secret") as rig:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
            response = httpx.post(f"{rig.url}/v1/completions", json=LONG, headers=headers, timeout=5)
            assert response.status_code == 401
            assert response.json()["error"]["type"] == "authentication_error"
            assert httpx.get(f"{rig.url}/v1/models", headers=headers, timeout=5).status_code == 401
        for path in ("/health", "/ready", "/metrics"):
            assert httpx.get(f"{rig.url}{path}", timeout=5).status_code == 200
        good = {"authorization": "Bearer secret"}
        assert httpx.get(f"{rig.url}/v1/models", headers=good, timeout=5).status_code == 200
        assert "secret" not in httpx.get(f"{rig.url}/server_info", headers=good, timeout=5).text


def test_two_hundred_at_once(rig: Rig) -> None:
    async def ask(client: httpx.AsyncClient, number: int) -> None:
        prompt = [10 + number, 11 + number, 12 + number]
        body = {"input_ids": prompt, "stream": number % 2 == 0, "sampling_params": {"max_new_tokens": 12}}
        for _ in range(200):
            response = await client.post(f"{rig.url}/generate", json=body)
            if response.status_code == 503:  # the queue is full: refused early, and told to come back
                assert response.headers["retry-after"]
                await asyncio.sleep(0.05)
                continue
            break
        assert response.status_code == 200, response.text
        data = response.text if number % 2 else response.text.strip().split("\n\n")[-2].removeprefix("data: ")
        assert json.loads(data)["output_ids"] == prompt * 4

    async def main() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=30, limits=limits) as client:
            await asyncio.gather(*(ask(client, number) for number in range(200)))

    asyncio.run(main())
    rig.settle()


def test_a_slow_client_costs_little_and_loses_nothing(rig: Rig) -> None:
    """It does not read while 900 tokens come (hundreds of kilobytes of cumulative events), then gets them all: what
    it missed was joined into few events."""
    body = json.dumps({
        "text": "hello there", "stream": True, "sampling_params": {"max_new_tokens": 900, "ignore_eos": True},
    }).encode()  # fmt: skip
    with raw_connection(rig) as connection:
        head = f"POST /generate HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        assert rig.engine is not None
        engine = rig.engine
        wait_for(lambda: rig.front.state.exchanges)
        wait_for(lambda: engine.idle)  # the engine does not wait for slow readers
        received = b""
        while piece := connection.recv(1 << 20):
            received += piece
    last = [line for line in received.split(b"\n") if line.startswith(b"data: {")][-1]
    assert len(json.loads(last[6:])["output_ids"]) == 900
    rig.settle()


def never_read(rig: Rig, connection: socket.socket) -> None:
    """Ask for 900 tokens with so many logprobs that the connection is full after a few."""
    body = json.dumps({
        "text": "hello there " * 30, "stream": True,
        "return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 64,
        "sampling_params": {"max_new_tokens": 600, "ignore_eos": True},
    }).encode()  # fmt: skip
    head = f"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    wait_for(lambda: any(e.sending_since for e in list(rig.front.state.exchanges)))


def generated(rig: Rig) -> int:
    assert rig.engine is not None
    return rig.engine.engine.load().generated_tokens


def test_what_a_client_leaves_unread_is_bounded(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baton.worker.client.MAX_BACKLOG", 20)
    before = generated(rig)
    with paced(rig, 0.01), raw_connection(rig) as connection:
        never_read(rig, connection)
        wait_for(lambda: not rig.front.state.client.open_count)
        wait_for(lambda: bool(rig.engine and rig.engine.idle))
        assert generated(rig) - before < 500
    rig.settle()


def test_a_client_that_never_reads_is_cut(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("baton.worker.front.STALL", 0.2)
    monkeypatch.setattr("baton.worker.front.WATCH", 0.05)
    with serving(model_dir, tmp_path) as rig, paced(rig, 0.01), raw_connection(rig) as connection:
        never_read(rig, connection)
        rig.settle()
        assert generated(rig) < 500
        connection.close()
    assert "has not read" in caplog.text


def test_abort_by_id(rig: Rig) -> None:
    with paced(rig, 0.01):
        body = {"text": "hello", "rid": "batch-1", "sampling_params": {"max_new_tokens": 900, "ignore_eos": True}}
        thread, results = in_background(lambda: httpx.post(f"{rig.url}/generate", json=body, timeout=10))
        other, others = in_background(
            lambda: httpx.post(
                f"{rig.url}/generate", json={**body, "rid": "else", "sampling_params": {"max_new_tokens": 30}}
            )
        )
        wait_for(lambda: rig.front.state.client.open_count == 2)
        time.sleep(0.1)
        assert httpx.post(f"{rig.url}/abort_request", json={"rid": ""}).status_code == 200
        assert httpx.post(f"{rig.url}/abort_request", json={"rid": "batch-"}).status_code == 200
        thread.join(5)
        other.join(5)
    response = results[0]
    assert isinstance(response, httpx.Response)
    assert response.status_code == 200
    answer = response.json()
    assert answer["meta_info"]["finish_reason"]["type"] == "abort"
    assert 0 < len(answer["output_ids"]) < 900
    assert answer["text"]
    assert isinstance(others[0], httpx.Response)
    assert others[0].json()["meta_info"]["finish_reason"]["type"] == "length"
    rig.settle()


def test_draining_finishes_streams_and_refuses_new_ones(model_dir: Path, tmp_path: Path) -> None:
    with serving(model_dir, tmp_path, drain=5.0) as rig:
        assert rig.engine is not None
        rig.engine.runner.pace = 0.01
        body = {"text": "hello", "stream": True, "sampling_params": {"max_new_tokens": 60, "ignore_eos": True}}
        thread, results = in_background(lambda: httpx.post(f"{rig.url}/generate", json=body, timeout=10))
        wait_for(lambda: rig.front.state.client.open_count)
        rig.loop.call_soon_threadsafe(rig.front.stop)
        thread.join(10)
        assert isinstance(results[0], httpx.Response)
        last = results[0].text.strip().split("\n\n")[-2]
        assert json.loads(last.removeprefix("data: "))["meta_info"]["finish_reason"]["type"] == "length"


def test_draining_has_an_end(model_dir: Path, tmp_path: Path) -> None:
    with serving(model_dir, tmp_path, drain=0.3) as rig:
        assert rig.engine is not None
        rig.engine.runner.pace = 0.02
        thread, results = in_background(
            lambda: httpx.post(f"{rig.url}/v1/completions", json={**LONG, "stream": True}, timeout=10)
        )
        wait_for(lambda: rig.front.state.client.open_count)
        time.sleep(0.1)
        started = time.monotonic()
        rig.loop.call_soon_threadsafe(rig.front.stop)
        thread.join(5)
        assert time.monotonic() - started < 2.0
        assert isinstance(results[0], httpx.Response)
        *_, error, done = results[0].text.strip().split("\n\n")
        assert done == "data: [DONE]"
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "unavailable"


def test_an_id_that_was_aborted_just_now_can_be_used_again(rig: Rig) -> None:
    """As a gateway's second attempt does. The engine is in the middle of a step: its last word on the first request
    comes when the second one is on its way already."""
    assert rig.engine is not None
    body = b'{"text": "hello there", "rid": "again", "sampling_params": {"max_new_tokens": 1000, "ignore_eos": true}}'
    head = f"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    second = {"text": "hello", "rid": "again", "sampling_params": {"max_new_tokens": 2}}
    with paced(rig, 0.4), httpx.Client(base_url=rig.url, timeout=20) as client:
        with raw_connection(rig) as connection:
            connection.sendall(head + body)
            wait_for(lambda: "again" in rig.front.state.client._inboxes and rig.engine.scheduler.running)
        wait_for(lambda: "again" not in rig.front.state.client._inboxes)
        meta = client.post("/generate", json=second).json()["meta_info"]
    assert (meta["id"], meta["finish_reason"]["type"]) == ("again", "length")
