"""Streams that say what they have shown, when the engine dies in the middle of one."""

from __future__ import annotations

import json
from typing import Any

import httpx

from .rig import Rig, wait_for

BODY: dict[str, Any] = {"prompt": "hello there", "max_tokens": 60, "ignore_eos": True, "stream": True}
JOURNAL = {"x-baton-journal": "1"}


def texts(events: bytes) -> str:
    lines = [line[6:] for line in events.decode().split("\n") if line.startswith("data: {")]
    return "".join(choice["text"] for line in lines for choice in json.loads(line)["choices"])


def signed(stream: bytes) -> tuple[bytes, list[int]]:
    """The stream up to the end of its last whole piece, and the tokens this stands for."""
    shown, tokens, whole = b"", [], b""
    for event in stream.split(b"\n\n"):
        shown += event + b"\n\n"
        _, line, ids = event.partition(b"\nid: ")
        if line:
            whole = shown
            tokens += [int(id) for id in ids.removeprefix(b"0:").rstrip(b"!").split(b",") if id]
    return whole, tokens


def test_what_was_shown_when_the_engine_died_is_known_and_goes_on(fresh: Rig) -> None:
    undisturbed = httpx.post(f"{fresh.url}/v1/completions", json=BODY, timeout=10)
    assert fresh.engine is not None
    fresh.engine.runner.pace = 0.01
    stream = b""
    with httpx.stream("POST", f"{fresh.url}/v1/completions", json=BODY, headers=JOURNAL, timeout=10) as response:
        for data in response.iter_raw():
            stream += data
            if stream.count(b"\nid: ") > 4 and not fresh.engine.dead.is_set():
                fresh.engine.kill()
    whole, tokens = signed(stream)
    assert 4 < len(tokens) < 60
    assert b'"retryable":true' in stream[len(whole) :]  # the error says nothing of tokens
    assert b"error" not in whole
    fresh.start_engine()
    before = {"outputs": [{"tokens": tokens}], "seed": int(response.headers["x-baton-seed"])}
    rest = httpx.post(f"{fresh.url}/v1/completions", json={**BODY, "baton_resume": before}, timeout=10)
    assert texts(whole) + texts(rest.content) == texts(undisturbed.content)
    wait_for(lambda: fresh.front.state.metrics.completion_tokens >= 120)
    fresh.settle()


def test_nothing_is_asked_of_the_engine_when_all_is_said(rig: Rig) -> None:
    assert rig.engine is not None
    steps = rig.engine.runner.steps
    before = {"outputs": [{"tokens": [9] * 60, "finished": True}, {"tokens": [8] * 60, "finished": True}]}
    response = httpx.post(
        f"{rig.url}/v1/completions", json={**BODY, "n": 2, "baton_resume": before}, headers=JOURNAL, timeout=10
    )
    assert response.content == b"data: [DONE]\nid: \n\n"
    assert "server-timing" not in response.headers
    assert rig.engine.runner.steps == steps
    rig.settle()
