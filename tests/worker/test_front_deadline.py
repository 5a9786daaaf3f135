"""A request ends in time: 504 in the client's format, and nothing of it is left in the engine."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from .rig import Rig, paced, serving

LONG = {"prompt": "hello there", "max_tokens": 900, "ignore_eos": True}
NATIVE = {"text": "hello there", "sampling_params": {"max_new_tokens": 900, "ignore_eos": True}}


@pytest.fixture(scope="module")
def hasty(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """A front that gives nobody more than half a second."""
    with serving(model_dir, tmp_path_factory.mktemp("hasty"), request_timeout=0.5) as rig:
        yield rig


@pytest.mark.parametrize(("path", "body"), [("/v1/completions", LONG), ("/generate", NATIVE)])
@pytest.mark.parametrize(
    ("header", "seconds"), [({}, 0.5), ({"x-request-timeout": "0.2"}, 0.2), ({"x-request-timeout": "99"}, 0.5)]
)
def test_in_time(hasty: Rig, path: str, body: dict[str, object], header: dict[str, str], seconds: float) -> None:
    with paced(hasty, 0.01):
        started = time.monotonic()
        reply = httpx.post(f"{hasty.url}{path}", json=body, headers=header, timeout=10)
        took = time.monotonic() - started
    assert reply.status_code == 504
    assert reply.json()["error"]["code"] == "timeout"
    assert "deadline" in reply.json()["error"]["message"]
    assert seconds <= took < seconds + 1.0
    hasty.settle()


def test_in_the_middle_of_a_stream(hasty: Rig) -> None:
    with paced(hasty, 0.01):
        reply = httpx.post(f"{hasty.url}/v1/completions", json={**LONG, "stream": True}, timeout=10)
    *tokens, error, done = [line[6:] for line in reply.text.splitlines() if line]
    assert reply.status_code == 200
    assert len(tokens) > 3
    assert json.loads(error)["error"]["code"] == "timeout"
    assert done == "[DONE]"
    hasty.settle()


@pytest.mark.parametrize("value", ["soon", "-1", "nan"])
def test_a_time_that_is_none(hasty: Rig, value: str) -> None:
    reply = httpx.post(f"{hasty.url}/v1/completions", json=LONG, headers={"x-request-timeout": value}, timeout=10)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "x-request-timeout"


def test_who_is_quick_notices_nothing(hasty: Rig) -> None:
    quick = {**LONG, "max_tokens": 3}
    assert httpx.post(f"{hasty.url}/v1/completions", json=quick, timeout=10).status_code == 200
    hasty.settle()
