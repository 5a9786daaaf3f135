"""Bad input, at the gateway and at either worker: a clear 4xx in the right shape, and everybody lives."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from tests.e2e.stacks import Stack, client

pytestmark = pytest.mark.parametrize("pd", ["shm"], indirect=True)  # nothing of it depends on how pages travel

SAY: dict[str, dict[str, Any]] = {
    "/generate": {"text": "a"},
    "/v1/completions": {"prompt": "a"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
}
"""The smallest body of each route."""
SAMPLING = {"max_tokens": "max_new_tokens", "seed": "sampling_seed"}
"""What `/generate` calls them."""

BROKEN: dict[str, bytes] = {
    "empty": b"",
    "cut off": b'{"prompt": "a',
    "not an object": b"[1, 2]",
    "trailing garbage": b"{} {}",
    "NaN": b'{"temperature": NaN}',
    "invalid UTF-8": b'{"prompt": "\xff", "text": "\xff", "messages": [{"role": "user", "content": "\xff"}]}',
    "lone surrogate": b'{"prompt": "\\ud800", "text": "\\ud800", "messages": [{"role": "user", "content": "\\ud800"}]}',
    "nested deeply": b'{"x": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    "nothing asked": b"{}",
}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "prompt is an object": ({"prompt": {"a": 1}}, "prompt"),
    "prompt is empty": ({"prompt": []}, "prompt"),
    "prompt too long": ({"prompt": "word " * 600}, "prompt"),
    "prompt far too long": ({"prompt": "word " * 100_000}, "prompt"),
    "stream is a word": ({"stream": "yes"}, "stream"),
    "temperature is a word": ({"temperature": "hot"}, "temperature"),
    "temperature below 0": ({"temperature": -1}, "temperature"),
    "max_tokens is a fraction": ({"max_tokens": 1.5}, "max_tokens"),
    "max_tokens is negative": ({"max_tokens": -4}, "max_tokens"),
    "n is 0": ({"n": 0}, "n"),
    "n is a word": ({"n": "two"}, "n"),
    "n is huge": ({"n": 1000}, "n"),
    "stop is a number": ({"stop": 5}, "stop"),
    "seed is huge": ({"seed": 10**30}, "seed"),
    "unknown model": ({"model": "gpt-17"}, "model"),
}
GRAMMARS = {"regex": "(", "json_schema": '{"type": "nope"}', "ebnf": "root ::= ("}


def body_of(path: str, wrong: dict[str, Any]) -> dict[str, Any] | None:
    """`wrong`, said in that route's words; None if it has none for it."""
    body = dict(SAY[path])
    for name, value in wrong.items():
        if name == "prompt":
            name = next(iter(body))
            value = [{"role": "user", "content": value}] if name == "messages" and value else value
        if path == "/generate" and name == "model":
            return None
        if path == "/generate" and name not in ("text", "stream"):
            body.setdefault("sampling_params", {})[SAMPLING.get(name, name)] = value
        else:
            body[name] = value
    return body


@pytest.fixture
def places(pd: Stack) -> Iterator[dict[str, httpx.Client]]:
    """A client for each process with a door; after the test the whole stack still serves."""
    urls = {"gateway": pd.url, "prefill": pd.worker("prefill"), "decode": pd.worker("decode")}
    with ExitStack() as open:
        yield {name: open.enter_context(client(url)) for name, url in urls.items()}
    assert pd.generate(text="still here?", sampling_params={"max_new_tokens": 2})["output_ids"]


def check(where: str, response: httpx.Response, status: int, says: str = "") -> dict[str, Any]:
    """The error, after a look at its shape."""
    assert response.status_code == status, f"{where}: {response.status_code} {response.text[:300]}"
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    if isinstance(error, str):  # the gateway's own words on routes that are not OpenAI's
        assert where == "gateway"
        assert not response.request.url.path.startswith("/v1/")
        error = {"message": error}
    else:
        assert set(error) >= {"message", "type", "param", "code"}
    assert error["message"]
    assert says in error["message"]
    return dict(error)


def post(http: httpx.Client, path: str, content: Any) -> httpx.Response:
    return http.post(path, content=content, headers={"content-type": "application/json"})


@pytest.mark.parametrize("path", SAY)
@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_read(places: dict[str, httpx.Client], path: str, content: bytes) -> None:
    for where, http in places.items():
        check(where, post(http, path, content), 400)


@pytest.mark.parametrize("path", SAY)
@pytest.mark.parametrize(("wrong", "param"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named(places: dict[str, httpx.Client], path: str, wrong: dict[str, Any], param: str) -> None:
    body = body_of(path, wrong)
    if body is None:
        return
    for where, http in places.items():
        for stream in (False, True):
            error = check(where, http.post(path, json={"stream": stream, **body}), 404 if param == "model" else 400)
            named = SAMPLING.get(param, param) if path == "/generate" else param
            named = next(iter(SAY[path])) if param == "prompt" else named
            assert named in str(error.get("param") or error["message"]), error


@pytest.mark.parametrize("path", SAY)
@pytest.mark.parametrize("kind", GRAMMARS)
def test_grammars_that_do_not_compile(places: dict[str, httpx.Client], path: str, kind: str) -> None:
    """Only an engine knows. Of a pair both do, and whoever is heard first says the same."""
    for where, stream, n in itertools.product(("gateway", "decode"), (False, True), (1, 3)):
        body = body_of(path, {kind: GRAMMARS[kind], "stream": stream, "n": n})
        check(where, places[where].post(path, json=body), 400, "cannot be used")


@pytest.mark.parametrize("path", [*SAY, "/tokenize", "/detokenize", "/abort_request"])
@pytest.mark.parametrize("chunked", [False, True])
def test_ten_megabytes(places: dict[str, httpx.Client], path: str, chunked: bool) -> None:
    piece = b" " * 1_000_000
    for where, http in places.items():
        check(where, post(http, path, iter([piece] * 10) if chunked else piece * 10), 413)


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("/tokenize", b'{"prompt": 5}'),
        ("/tokenize", b'{"prompt": "\xff"}'),
        ("/detokenize", b'{"tokens": [4000]}'),
        ("/detokenize", b'{"tokens": ["a"]}'),
        ("/abort_request", b'{"rid": 5}'),
        ("/abort_request", b'{"rid": "\xff"}'),
        ("/abort_request", b"{"),
    ],
)
def test_other_routes(places: dict[str, httpx.Client], path: str, content: bytes) -> None:
    for where, http in places.items():
        check(where, post(http, path, content), 400)


def test_models_and_routes_that_are_not_there(places: dict[str, httpx.Client]) -> None:
    for where, http in places.items():
        for name in ("none", "a%20b", "%C3%BC", "a%3Fb"):
            check(where, http.get(f"/v1/models/{name}"), 404)
        check(where, http.get("/v1/completions"), 404 if where == "gateway" else 405)
        check(where, http.post("/v1/nothing", json={}), 404)


def test_rendezvous_fields_of_the_client(places: dict[str, httpx.Client]) -> None:
    """The gateway replaces them, whatever they are; a worker checks them."""
    for wrong in ({"bootstrap_room": "x"}, {"bootstrap_room": -1}, {"bootstrap_room": [1, 2]}, {"bootstrap_port": "x"}):
        body = {"prompt": "a", "max_tokens": 2, "bootstrap_room": 1, **wrong}
        assert places["gateway"].post("/v1/completions", json=body).status_code == 200
        for where in ("prefill", "decode"):
            error = check(where, places[where].post("/v1/completions", json=body), 400)
            assert error["param"] == next(iter(wrong))
    check(
        "gateway", post(places["gateway"], "/v1/completions", b'{"prompt": "a", "bootstrap_room": 1, "\xff": 1}'), 400
    )


@pytest.mark.parametrize("path", SAY)
@pytest.mark.parametrize("more", [{}, {"stream": True}, {"n": 3}], ids=json.dumps)
def test_prefill_without_a_room(places: dict[str, httpx.Client], path: str, more: dict[str, Any]) -> None:
    body = body_of(path, more)
    error = check("prefill", places["prefill"].post(path, json=body), 400, "no bootstrap_room")
    assert error["param"] == "bootstrap_room"
