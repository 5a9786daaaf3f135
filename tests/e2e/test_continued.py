"""A stream of a decode worker that is cut after any piece goes on on another worker, and nobody can tell.

The workers are asked directly, as a gateway asks them: a pair gets the same body twice, with a room.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from tests.e2e.stacks import Stack, client

MOST = 24
MESSAGES = [{"role": "user", "content": "hello there, one two three"}]
CHAT: dict[str, Any] = {"messages": MESSAGES, "max_tokens": MOST, "temperature": 0}
TEXT: dict[str, Any] = {"prompt": "The runner who has finished", "max_tokens": MOST, "temperature": 0}
PARAMS: dict[str, Any] = {"max_new_tokens": MOST, "temperature": 0}
SEEDED = {"temperature": 1.0, "seed": 11}
UNSEEDED = {"temperature": 1.0}
PENALTIES = {"presence_penalty": 0.5, "frequency_penalty": 0.4, "repetition_penalty": 1.3, "min_tokens": 6}
USAGE = {"stream_options": {"include_usage": True}}
SCHEMA = {
    "type": "object",
    "properties": {"yes": {"type": "boolean"}, "n": {"enum": [1, 22, 333]}, "s": {"enum": ["some", "thing"]}},
    "required": ["yes", "n", "s"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": SCHEMA}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA}}
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {**CHAT, **USAGE}),
    "chat, two unseeded": ("/v1/chat/completions", {**CHAT, **UNSEEDED, **USAGE, "n": 2}),
    "chat, logprobs": ("/v1/chat/completions", {**CHAT, **SEEDED, **PENALTIES, "logprobs": True, "top_logprobs": 3}),
    "chat, schema": ("/v1/chat/completions", {**CHAT, **SEEDED, "max_tokens": 90, "response_format": FORMAT}),
    "chat, tool": ("/v1/chat/completions", {**CHAT, **SEEDED, "max_tokens": 90, "tools": [TOOL],
                                            "tool_choice": "required", "parallel_tool_calls": False}),
    "completions": ("/v1/completions", {**TEXT, **USAGE, "echo": True}),
    "completions, stop": ("/v1/completions", {**TEXT, **SEEDED, "n": 3, "stop": ["e", "1", "or"]}),
    "completions, two prompts": ("/v1/completions", {**TEXT, **UNSEEDED, "prompt": ["one", "two two"], "logprobs": 2}),
    "generate": ("/generate", {"text": "hello there", "sampling_params": PARAMS}),
    "generate, unseeded": ("/generate", {"text": ["a b", "c"], "sampling_params": {**PARAMS, **UNSEEDED, "n": 2}}),
    "generate, regex": ("/generate", {"text": "hello", "sampling_params": {**PARAMS, "regex": "[a-z]{3,9}[0-9]{40}"}}),
}  # fmt: skip
SALTS = itertools.count()


@dataclass
class Streamed:
    pieces: list[bytes] = field(default_factory=list)
    """Each up to the blank line after its journal's line."""
    headers: Mapping[str, str] = field(default_factory=dict)


class Workers:
    """An undivided worker and a pair, by their own URLs."""

    def __init__(self, unified: Stack, pair: Stack) -> None:
        self.unified = unified.worker("regular")
        self.prefill, self.decode = pair.worker("prefill"), pair.worker("decode")
        self.port = next(w["bootstrap_port"] for w in pair.workers() if w["worker_type"] == "prefill")
        self._whole: dict[str, Streamed] = {}

    def whole(self, name: str) -> Streamed:
        """The undisturbed stream of a pair."""
        if name not in self._whole:
            self._whole[name] = self.ask("pair", *BODIES[name])
        return self._whole[name]

    def ask(self, where: str, path: str, body: dict[str, Any]) -> Streamed:
        body = {**body, "stream": True, "cache_salt": f"continued {next(SALTS)}"}
        if where == "unified":
            return stream(self.unified, path, body)
        room = random.randrange(1, 2**62)
        body |= {"bootstrap_host": "127.0.0.1", "bootstrap_port": self.port, "bootstrap_room": room}
        with ThreadPoolExecutor(1) as other:
            prefill = other.submit(stream, self.prefill, path, body)
            decode = stream(self.decode, path, body)
        prefill.result()
        return decode


def stream(url: str, path: str, body: dict[str, Any]) -> Streamed:
    streamed, piece = Streamed(), b""
    headers = {"x-baton-journal": "1", "x-request-id": "same"}
    with client(url) as http, http.stream("POST", path, json=body, headers=headers) as response:
        assert response.status_code == 200, response.read()
        streamed.headers = response.headers
        signed = False
        # A line ends with a line feed: httpx would end it at U+2028 as well, which a random model may say.
        for line in b"".join(response.iter_bytes()).split(b"\n")[:-1]:
            piece += line + b"\n"
            signed = signed or line.startswith(b"id:")
            if signed and not line:
                streamed.pieces.append(piece)
                piece, signed = b"", False
    assert not piece
    return streamed


@pytest.fixture(scope="module")
def workers(unified: Stack, pds: dict[str, Stack]) -> Iterator[Workers]:
    yield Workers(unified, pds["shm"])
    for stack in (unified, pds["shm"]):
        stack.assert_clean()


def resume(streamed: Streamed, cut: int, count: int) -> dict[str, Any]:
    """`baton_resume` after the first `cut` pieces."""
    outputs: list[dict[str, Any]] = [{"tokens": [], "finished": False} for _ in range(count)]
    for piece in streamed.pieces[:cut]:
        line = piece.rpartition(b"\nid: ")[2].strip().decode()
        for entry in line.split(";") if line else []:
            index, _, ids = entry.partition(":")
            outputs[int(index)]["finished"] = ids.endswith("!")
            outputs[int(index)]["tokens"] += [int(id) for id in ids.rstrip("!").split(",") if id]
    first = events(streamed.pieces[:1])[0]
    known = {key: first[key] for key in ("id", "created") if key in first}
    return {"outputs": outputs, "seed": int(streamed.headers["x-baton-seed"]), **known}


def events(pieces: Sequence[bytes]) -> list[dict[str, Any]]:
    lines = b"".join(pieces).decode().split("\n")
    return [json.loads(line[6:]) for line in lines if line.startswith("data: ") and line != "data: [DONE]"]


def joined(pieces: Sequence[bytes]) -> Any:
    """What a client makes of a stream. How many tokens an event has is a matter of time, nothing else is."""
    found = events(pieces)
    assert pieces[-1].partition(b"\nid: ")[0].endswith(b"data: [DONE]")
    if "output_ids" in found[0]:
        return cumulative(found)
    frames = {json.dumps([event[key] for key in ("id", "object", "created", "model")]) for event in found}
    choices: dict[int, Any] = {}
    for event in found:
        for choice in event["choices"]:
            grow(choices.setdefault(choice["index"], {}), choice)
    return frames, choices, [event["usage"] for event in found if event.get("usage")]


def grow(whole: dict[str, Any], part: dict[str, Any]) -> None:
    for key, value in part.items():
        if key == "index":
            whole[key] = value
        elif key == "id":
            whole[key] = "call"  # drawn at random
        elif isinstance(value, dict):
            grow(whole.setdefault(key, {}), value)
        elif key == "tool_calls":
            for call in value:
                grow(whole.setdefault(key, {}).setdefault(call["index"], {}), call)
        elif value is not None:
            whole[key] = whole[key] + value if key in whole else value


def cumulative(found: list[dict[str, Any]]) -> dict[int, Any]:
    last: dict[int, Any] = {}
    for event in found:
        index = event.get("index", 0)
        if index in last:
            assert len(event["output_ids"]) >= len(last[index]["output_ids"])
            assert event["text"].startswith(last[index]["text"])
        last[index] = event
    for event in last.values():
        for name in ("e2e_latency", "first_token_latency", "response_sent_to_client_ts", "timeline"):
            event["meta_info"].pop(name)
    return last


@pytest.mark.parametrize("where", ["unified", "pair"])
@pytest.mark.parametrize("name", BODIES)
def test_goes_on_elsewhere(workers: Workers, name: str, where: str) -> None:
    path, body = BODIES[name]
    whole = workers.whole(name)
    wanted = joined(whole.pieces)
    last = len(whole.pieces) - 1
    count = len(wanted if path == "/generate" else wanted[1])
    assert last > 4, "too short to be cut"
    for cut in (0, 1, last // 2, last):
        before = resume(whole, cut, count)
        rest = workers.ask(where, path, {**body, "baton_resume": before})
        assert joined([*whole.pieces[:cut], *rest.pieces]) == wanted, cut
        assert resume(Streamed([*whole.pieces[:cut], *rest.pieces], whole.headers), 10**6, count) == resume(
            whole, 10**6, count
        ), cut
        assert rest.headers["x-baton-seed"] == whole.headers["x-baton-seed"]


def test_unseeded_ones_are_not_all_the_same(workers: Workers) -> None:
    """Else the tests above would say nothing of seeds."""
    whole = workers.whole("chat, two unseeded")
    again = workers.ask("pair", *BODIES["chat, two unseeded"])
    assert joined(again.pieces)[1] != joined(whole.pieces)[1]
    assert again.headers["x-baton-seed"] != whole.headers["x-baton-seed"]


def test_without_the_header_there_is_no_journal(workers: Workers) -> None:
    with client(workers.unified) as http:
        response = http.post("/v1/completions", json={**TEXT, "stream": True})
        scored = http.post(
            "/generate",
            json={"text": "hello", "sampling_params": PARAMS, "return_logprob": True, "stream": True},
            headers={"x-baton-journal": "1"},
        )
    for answer in (response, scored):
        assert answer.text.endswith("data: [DONE]\n\n")
        assert "\nid:" not in answer.text
        assert "x-baton-seed" not in answer.headers


@pytest.mark.parametrize(
    ("before", "words"),
    [
        ({"outputs": []}, "has 0 outputs"),
        ({"outputs": [{"tokens": [10**6]}]}, "token ids"),
        ({"outputs": [{"tokens": [20] * (MOST + 1)}]}, "has 25 tokens"),
        ({"outputs": [{"tokens": "x"}]}, "Expected `array`"),
    ],
)
def test_what_cannot_be_resumed(workers: Workers, before: dict[str, Any], words: str) -> None:
    for url in (workers.unified, workers.prefill, workers.decode):
        with client(url) as http:
            response = http.post("/v1/completions", json={**TEXT, "stream": True, "baton_resume": before})
        assert response.status_code == 400
        assert words in response.json()["error"]["message"]
        assert response.json()["error"]["param"].startswith("baton_resume")


def stages(response: httpx.Response) -> dict[str, float]:
    entries = [entry.partition(";dur=") for entry in response.headers["server-timing"].split(", ")]
    return {name: float(duration) for name, _, duration in entries}


@pytest.mark.parametrize("streamed", [False, True])
def test_stages_in_the_head(workers: Workers, streamed: bool) -> None:
    def ask(url: str, room: int | None) -> dict[str, float]:
        where = {"bootstrap_host": "127.0.0.1", "bootstrap_port": workers.port, "bootstrap_room": room}
        with client(url) as http:
            response = http.post("/v1/completions", json={**TEXT, "stream": streamed, **(where if room else {})})
        assert response.status_code == 200
        return stages(response)

    room = random.randrange(1, 2**62)
    with ThreadPoolExecutor(1) as other:
        prefill = other.submit(ask, workers.prefill, room)
        decode = ask(workers.decode, room)
    ends = [] if streamed else ["decode"]
    assert list(decode) == ["offer", "handoff", "first_token", *ends]
    assert list(prefill.result()) == ["queue", "prefill", "transfer"]
    assert list(ask(workers.unified, None)) == ["queue", "prefill", "first_token", *ends]
    assert decode["first_token"] >= decode["handoff"]
    assert all(duration >= 0 for duration in (*decode.values(), *prefill.result().values()))
