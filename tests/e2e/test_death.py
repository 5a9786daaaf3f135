"""Processes die; clients hear of it at once, the supervisor brings them back, and the peers leak nothing."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from tests.e2e.stacks import PD, SMALL, Stack, serve

LONG = {
    "text": "word " * 10,
    "sampling_params": {"max_new_tokens": 380, "ignore_eos": True, "temperature": 0},
}


@pytest.fixture
def stack(tiny_model_dir: Path, tmp_path: Path) -> Iterator[Stack]:
    with serve(tiny_model_dir, PD, tmp_path, *SMALL) as running:
        yield running


def engine_of(stack: Stack, role: str) -> psutil.Process:
    """The process that a worker's server_info names as its engine."""
    worker = next(w for w in stack.workers() if w["worker_type"] == role)
    info = httpx.get(f"{worker['url']}/server_info", timeout=5).json()
    return psutil.Process(int(info["engine_pid"]))


def ask(stack: Stack, stream: bool) -> tuple[float, str]:
    """(when the answer ended, how): a status line's code, or the last event of a stream."""
    if not stream:
        response = httpx.post(f"{stack.url}/generate", json=LONG, timeout=60)
        return time.monotonic(), str(response.status_code)
    last = ""
    with httpx.stream("POST", f"{stack.url}/generate", json={**LONG, "stream": True}, timeout=60) as response:
        if response.status_code != 200:
            return time.monotonic(), str(response.status_code)
        for line in response.iter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                last = line
    return time.monotonic(), last


def wait_served(stack: Stack, patience: float) -> None:
    """Until then, refusals are clear: 502 or 503, in the right shape."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        body = {"text": "alive again?", "sampling_params": {"max_new_tokens": 3}}
        response = httpx.post(f"{stack.url}/generate", json=body, timeout=30)
        if response.status_code == 200:
            return
        assert response.status_code in (502, 503), response.text
        assert response.json()["error"]
        threading.Event().wait(0.2)
    raise AssertionError(f"not served again in {patience} s")


def kill_in_the_middle(stack: Stack, role: str) -> tuple[float, list[tuple[float, str]]]:
    """(when it was killed, how eight requests ended)."""
    with ThreadPoolExecutor(8) as pool:
        waiting: list[Future[tuple[float, str]]] = [pool.submit(ask, stack, i % 2 == 0) for i in range(8)]
        threading.Event().wait(0.25)
        killed_at = time.monotonic()
        engine_of(stack, role).send_signal(signal.SIGKILL)
        return killed_at, [future.result() for future in waiting]


@pytest.mark.slow
@pytest.mark.parametrize("role", ["decode", "prefill"])
def test_an_engine_is_killed_and_nobody_hears_of_it(tiny_model_dir: Path, tmp_path: Path, role: str) -> None:
    """There is one of each: decode does without prefill, and for decode everybody waits until it is back."""
    with serve(tiny_model_dir, PD, tmp_path, *SMALL, "--worker-wait", "45", "--retries", "9") as stack:
        text = str(stack.generate(**LONG)["text"])
        _, ends = kill_in_the_middle(stack, role)
        assert {end if end == "200" else json.loads(end.removeprefix("data: "))["text"] for _, end in ends} == {
            "200",
            text,
        }
        stack.settle()


@pytest.mark.slow
def test_who_does_not_want_to_wait_hears_of_it_at_once(tiny_model_dir: Path, tmp_path: Path) -> None:
    with serve(tiny_model_dir, PD, tmp_path, *SMALL, "--worker-wait", "0") as stack:
        stack.generate(text="warm", sampling_params={"max_new_tokens": 2})
        killed_at, ends = kill_in_the_middle(stack, "decode")
        assert any("error" in how or how in ("500", "502", "503") for _, how in ends), ends
        assert max(when for when, _ in ends) - killed_at < 2.0
        wait_served(stack, 30)
        stack.settle()


@pytest.mark.slow
def test_the_supervisor_is_killed(tiny_model_dir: Path, tmp_path: Path) -> None:
    with serve(tiny_model_dir, PD, tmp_path, *SMALL) as stack:
        family = stack.processes
        assert len(family) >= 5
        os.kill(stack.process.pid, signal.SIGKILL)
        stack.process.wait(5)
        _, alive = psutil.wait_procs(family, timeout=5)
        assert not alive


@pytest.mark.slow
def test_interrupted_while_busy(stack: Stack) -> None:
    """Ctrl-C with requests under way: all of it ends, in time (the fixture checks that nothing is left)."""
    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            pool.submit(lambda: httpx.post(f"{stack.url}/generate", json=LONG, timeout=60))
        threading.Event().wait(0.3)
        started = time.monotonic()
        stack.stop()
        assert time.monotonic() - started < 15
