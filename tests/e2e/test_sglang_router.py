"""Our workers behind the real sglang-router: SGLang's protocol, spoken by a program that does not know us.

It is put before the workers of a stack that `baton serve` started, whose own gateway stays idle meanwhile.
"""

from __future__ import annotations

import asyncio
import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.asking import ENDPOINTS, PATIENCE, Ask, ask_all, unlike
from tests.e2e.stacks import SMALL, START_PATIENCE, STOP_PATIENCE, Stack, client, free_port, serve
from tests.e2e.test_death import engine_of
from tests.e2e.test_disconnects import EVERY_MANNER, POLITE, generated, receive
from tests.e2e.test_http import parted, streamed, whole

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("sglang_router") is None, reason="sglang-router is not installed"),
]

TWO_PAIRS = "native(P:d2t1p1|D:d2t1p1)"
LONG = "hello there " * 12
ASKS = {
    "greedy": Ask("hello there"),
    "many chunks": Ask("hello there " * 14),
    "one token": Ask("hello", max_tokens=1),
    "seeded": Ask("one two", temperature=0.9, seed=11),
    "samples": Ask("one two", temperature=1.0, seed=5, n=3),
    "stop": Ask("hello there", max_tokens=40, stop=("e", "1", "or")),
    "logprobs": Ask("hello there", temperature=0.8, n=2, top_logprobs=2),
}
"""Structured output stands apart: of its spellings the router knows some, on each endpoint others."""

BRIEF = {"model": "default", "temperature": 0, "max_tokens": 7}
GREEDY = {"temperature": 0, "max_new_tokens": 7}
SCHEMA = {"type": "object", "properties": {"n": {"enum": [1, 22, 333]}}, "required": ["n"]}
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "ids": ("/generate", {"input_ids": list(range(20, 60)), "sampling_params": GREEDY}),
    "batch of ids": ("/generate", {"input_ids": [[20, 21, 22], list(range(30, 90))], "sampling_params": GREEDY}),
    "regex": ("/generate", {"text": "n = ", "sampling_params": {**GREEDY, "regex": "[1-9][0-9]{2}"}}),
    "prompts": ("/v1/completions", {"prompt": ["one", "two two", LONG], **BRIEF}),
    "samples of prompts": ("/v1/completions", {"prompt": ["one", "two"], "n": 2, **BRIEF, "temperature": 1, "seed": 8}),
    "choice": ("/v1/completions", {"prompt": "yes or no?", "guided_choice": ["yes", "no"], **BRIEF}),
    "schema": (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": "{"}],
            "response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA}},
            **BRIEF,
            "max_tokens": 60,
        },
    ),
    "conversation": (
        "/v1/chat/completions",
        {
            "messages": [
                {"role": "system", "content": "Zwölf"},
                {"role": "user", "content": [{"type": "text", "text": LONG}]},
                {"role": "assistant", "content": "größer"},
                {"role": "user", "content": "🏃 ok?"},
            ],
            "temperature": 0,
            "max_tokens": 7,  # and no model: the router writes one
        },
    ),
}
REFUSED: dict[str, tuple[str, dict[str, Any], int, str]] = {
    "out of range": ("/generate", {"text": "hi", "sampling_params": {"temperature": -1}}, 400, "temperature is -1"),
    "too long": ("/v1/completions", {"prompt": "word " * 900, **BRIEF}, 400, "context holds 512"),
    "no such model": (
        "/v1/chat/completions",
        {"model": "nobody", "messages": [{"role": "user", "content": "hi"}]},
        404,
        '"nobody" is not served here',
    ),
    "a bad grammar": ("/generate", {"text": "hi", "sampling_params": {"regex": "(("}}, 400, "regex"),
}


@contextmanager
def routing(stack: Stack, directory: Path, *flags: str) -> Iterator[Stack]:
    """The stack as seen through a router of its own."""
    port, log = free_port(), directory / "router.log"
    command = [sys.executable, "-m", "sglang_router.launch_router", "--pd-disaggregation", "--policy", "round_robin"]
    for worker in stack.workers():
        place = [str(worker["url"])] if worker["worker_type"] == "decode" else [str(worker["url"]), bootstrap(worker)]
        command += [f"--{worker['worker_type']}", *place]
    command += ["--host", "127.0.0.1", "--port", str(port), "--log-level", "warn", *flags]
    command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        through = replace(stack, url=f"http://127.0.0.1:{port}")
        wait_ready(process, through.url, len(stack.workers()), log)
        yield through
    finally:
        process.terminate()
        try:
            process.wait(STOP_PATIENCE)
        finally:
            process.kill()
            process.wait()


def bootstrap(worker: dict[str, object]) -> str:
    return str(worker["bootstrap_port"])


def wait_ready(process: subprocess.Popen[bytes], url: str, workers: int, log: Path) -> None:
    """Until it has registered all of them; it calls itself ready with the first pair."""
    deadline = time.monotonic() + START_PATIENCE
    with client(url, 2) as http:
        while time.monotonic() < deadline:
            assert process.poll() is None, f"the router ended early:\n{log.read_text()[-4000:]}"
            try:
                if http.get("/readiness").json().get("healthy_workers") == workers:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.02)
    raise AssertionError(f"not ready in {START_PATIENCE} s:\n{log.read_text()[-4000:]}")


@pytest.fixture(scope="module")
def router(pds: dict[str, Stack], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with routing(pds["shm"], tmp_path_factory.mktemp("router")) as through:
        yield through


@pytest.fixture
def routed(router: Stack, pds: dict[str, Stack]) -> Iterator[Stack]:
    yield router
    pds["shm"].assert_clean()


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_answers_are_the_undivided_workers(routed: Stack, unified: Stack, endpoint: str, stream: bool) -> None:
    theirs = ask_all(unified.url, {name: (endpoint, ask, False) for name, ask in ASKS.items()}, at_once=1)
    ours = ask_all(routed.url, {name: (endpoint, ask, stream) for name, ask in ASKS.items()}, at_once=len(ASKS))
    assert not unlike(ours, theirs.__getitem__)


@pytest.mark.parametrize(("path", "body"), BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("ask", [whole, streamed])
def test_what_only_one_endpoint_takes(routed: Stack, unified: Stack, ask: Any, path: str, body: dict[str, Any]) -> None:
    ours, theirs = list[float](), list[float]()
    assert parted(ask(routed, path, body), ours) == parted(whole(unified, path, body), theirs)
    assert ours == pytest.approx(theirs, abs=1e-3)


def test_prompt_logprobs_are_merged(routed: Stack, unified: Stack) -> None:
    """By the router, from both replies: it is the prefill worker that has them."""
    body = {"text": LONG, "return_logprob": True, "logprob_start_len": 0, "sampling_params": GREEDY}
    ours, theirs = list[float](), list[float]()
    answers = whole(routed, "/generate", body)
    assert parted(answers, ours) == parted(whole(unified, "/generate", body), theirs)
    assert len(answers[0]["input_token_logprobs"]) == answers[0]["prompt_tokens"]
    assert ours == pytest.approx(theirs, abs=1e-3)


@pytest.mark.parametrize(("path", "body", "status", "why"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_refusals_pass(routed: Stack, path: str, body: dict[str, Any], status: int, why: str, stream: bool) -> None:
    with client(routed.url) as http:
        response = http.post(path, json={**body, "stream": stream})
    assert response.status_code == status
    assert why in response.text.replace("\\", "")


def test_who_leaves_takes_nothing_along(routed: Stack, pds: dict[str, Stack], unified: Stack) -> None:
    """In every manner but asking for the abort, for which the router has no route."""
    history = [visit for visit in EVERY_MANNER if visit.manner != "abort"]
    polite = ask_all(unified.url, POLITE, at_once=len(POLITE))
    assert not unlike(asyncio.run(receive(routed, history, POLITE)), polite.__getitem__)
    pds["shm"].settle()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_what_nobody_waits_for_is_not_computed(routed: Stack, pds: dict[str, Stack], stream: bool) -> None:
    endless = {"model": "default", "ignore_eos": True, "max_tokens": 480, "stream": stream}
    bodies = {
        "/v1/completions": {"prompt": "word", **endless},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "word"}], **endless},
        "/generate": {
            "text": "word",
            "sampling_params": {"ignore_eos": True, "max_new_tokens": 480},
            "stream": stream,
        },
    }
    before = generated(pds["shm"])

    async def leave_when_they_have_begun() -> None:
        async with httpx.AsyncClient(base_url=routed.url, timeout=PATIENCE, verify=False) as http:
            asked = [asyncio.ensure_future(http.post(path, json=body)) for path, body in bodies.items() for _ in "ab"]
            while await asyncio.to_thread(generated, pds["shm"]) < before + len(asked):
                await asyncio.sleep(0.001)
            for one in asked:
                one.cancel()
            await asyncio.wait(asked)

    asyncio.run(asyncio.wait_for(leave_when_they_have_begun(), PATIENCE))
    pds["shm"].settle()
    assert generated(pds["shm"]) - before < 2 * len(bodies) * 480 / 2


# --- two prefill and two decode workers


@pytest.fixture(scope="module")
def two_pairs(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stack, Stack]]:
    """(the stack, the same through the router). The router may try often enough to be lucky with round robin, and as
    it leaves a prefill worker waiting for a decode worker that has refused, that wait is short."""
    directory = tmp_path_factory.mktemp("two-pairs")
    flags = (*SMALL, "--disaggregation-transfer-backend", "tcp", "--meet-timeout", "3")
    with (
        serve(tiny_model_dir, TWO_PAIRS, directory, *flags) as stack,
        routing(stack, directory, "--retry-max-retries", "20", "--retry-max-backoff-ms", "200") as through,
    ):
        yield stack, through


def test_all_share_the_work(two_pairs: tuple[Stack, Stack], unified: Stack) -> None:
    stack, through = two_pairs
    asks = {(name, at): ("chat", ask, True) for name, ask in ASKS.items() for at in range(4)}
    theirs = ask_all(unified.url, {name: ("chat", ask, False) for name, ask in ASKS.items()}, at_once=1)
    before = handed_off(stack)
    assert not unlike(ask_all(through.url, asks, at_once=4), lambda key: theirs[key[0]])
    each = [now - then for now, then in zip(handed_off(stack), before, strict=True)]
    assert len(each) == 4
    assert min(each) > 0, f"somebody had nothing to do: {each}"
    stack.assert_clean()


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_an_engine_dies_and_no_answer_is_lost(two_pairs: tuple[Stack, Stack], unified: Stack, role: str) -> None:
    """Workers say so before an answer begins, with a status that lets the router try again; whole answers begin at
    their end. It takes the engine of one of the two workers, and the supervisor brings it back meanwhile."""
    stack, through = two_pairs
    ask = Ask("hello there " * 6, max_tokens=300, temperature=1.0, seed=3)
    asks = {at: ("generate", replace(ask, seed=at), False) for at in range(8)}
    theirs = ask_all(unified.url, asks, at_once=4)
    before = sum(handed_off(stack))
    with ThreadPoolExecutor(1) as pool:
        ours = pool.submit(ask_all, through.url, asks, at_once=len(asks))
        wait_until(lambda: sum(handed_off(stack)) > before or ours.done())
        assert not ours.done()
        engine_of(stack, role).kill()
        assert not unlike(ours.result(), theirs.__getitem__)
    wait_until(lambda: all(healthy(str(worker["url"])) for worker in stack.workers()))
    stack.settle()


def wait_until(met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def healthy(url: str) -> bool:
    """As the worker itself says; it knows of its engine's death at once."""
    with client(url) as http:
        return http.get("/health").status_code == 200


def handed_off(stack: Stack) -> list[int]:
    """Sequences that each worker has given or taken."""
    counts = []
    for worker in stack.workers():
        with client(str(worker["url"])) as http:
            families = list(text_string_to_metric_families(http.get("/metrics").text))
        samples = [sample for family in families for sample in family.samples]
        done = [s.value for s in samples if s.name == "baton_handoffs_total" and s.labels["outcome"] == "done"]
        counts.append(int(sum(done)))
    return counts
