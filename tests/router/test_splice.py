"""Splicing: whatever JSON object comes in, the same object goes out with the rendezvous in it."""

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.base.errors import BadRequest
from baton.router import splice
from baton.router.splice import Kind

KINDS: tuple[Kind, ...] = ("generate", "completions", "other")
ROUTING = ("bootstrap_host", "bootstrap_port", "bootstrap_room", "routed_dp_rank", "disagg_prefill_dp_rank")
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(-1e300, 1e300) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
names = st.sampled_from(["stream", "n", "prompt", "text", "input_ids", "sampling_params", "echo", *ROUTING]) | st.text()
bodies = st.dictionaries(names, values, max_size=8)


def sent(raw: bytes, kind: Kind, port: int | None = 8998) -> tuple[Any, Any]:
    body = splice.read(raw, kind)
    rooms = list(range(100, 100 + (body.samples or 1)))
    prefill, decode = splice.pair(body, "10.0.0.1", port, rooms)
    return json.loads(prefill), json.loads(decode)


@settings(max_examples=60, deadline=None)
@given(body=bodies, kind=st.sampled_from(KINDS), indent=st.sampled_from([None, 1]), ascii_only=st.booleans())
def test_any_object_stays_itself_and_gets_the_rendezvous(
    body: dict[str, Any], kind: Kind, indent: int | None, ascii_only: bool
) -> None:
    try:
        raw = json.dumps(body, indent=indent, ensure_ascii=ascii_only).encode()
    except UnicodeEncodeError:
        return  # lone surrogates cannot be sent as UTF-8
    try:
        prefill, decode = sent(raw + b" \n", kind)
    except BadRequest:
        assert "\\ud" in raw.decode().lower() or _greatest_n(body) > 1024
        return
    for name in ("bootstrap_host", "bootstrap_port", "bootstrap_room"):
        assert name in prefill
        assert prefill[name] == decode[name]
    room = decode["bootstrap_room"]
    assert room == (list(range(100, 100 + len(room))) if isinstance(room, list) else 100)
    rest = {k: v for k, v in decode.items() if k not in ROUTING}
    assert rest == {k: v for k, v in body.items() if k not in ROUTING}
    assert rest == {k: v for k, v in prefill.items() if k not in ROUTING}


def _greatest_n(body: dict[str, Any]) -> int:
    sampling = body.get("sampling_params")
    places = [body, *(sampling if isinstance(sampling, list) else [sampling])]
    return max((p["n"] for p in places if isinstance(p, dict) and type(p.get("n")) is int), default=1)


def test_without_client_fields_not_a_byte_changes() -> None:
    raw = b'{ "z":1.50,\t"messages":[{"content":"\\u00e9 \xc3\xa9"}], "a" : 1e5 }\n'
    prefill, decode = splice.pair(splice.read(raw, "other"), "h", None, [7])
    assert prefill is decode
    assert decode == raw[:-3] + b',"bootstrap_host":"h","bootstrap_port":null,"bootstrap_room":7}'
    assert splice.single(splice.read(raw, "other")) is raw


def test_an_empty_object() -> None:
    assert sent(b" { } ", "other")[0]["bootstrap_room"] == 100


@pytest.mark.parametrize(
    "raw",
    [
        b'{"bootstrap_room": 1, "a": 2, "bootstrap_room": 3}',
        b'{"bootstrap\\u005froom": 1, "a": 2}',
        b'{"a": 2, "bootstrap_host": "evil", "bootstrap_port": 1, "bootstrap_room": [1, 2]}',
    ],
)
def test_client_sent_rendezvous_is_replaced_everywhere(raw: bytes) -> None:
    body = splice.read(raw, "other")
    out, _ = splice.pair(body, "p", 1, [9])
    assert out.count(b"bootstrap_room") == 1
    assert b"u005f" not in out
    assert b"evil" not in out
    assert json.loads(out) == {"a": 2, "bootstrap_host": "p", "bootstrap_port": 1, "bootstrap_room": 9}
    assert json.loads(splice.single(body)) == {"a": 2}


@pytest.mark.parametrize(
    ("kind", "body", "samples"),
    [
        ("generate", {"text": "a"}, None),
        ("generate", {"text": ["a"]}, 1),
        ("generate", {"text": ["a", "b"], "sampling_params": {"n": 3}}, 6),
        ("generate", {"text": None, "input_ids": [1, 2, 3]}, None),
        ("generate", {"input_ids": [[1, 2], [3]]}, 2),
        ("generate", {"input_ids": [[1], [2]], "sampling_params": [{"n": 2}, {"n": 2}]}, 4),
        ("generate", {"text": "a", "sampling_params": {"n": 2}}, 2),
        ("generate", {"input_embeds": [[0.5], [0.5]]}, None),
        ("generate", {"input_embeds": [[[0.5]], [[0.5]]]}, 2),
        ("completions", {"prompt": "a", "n": 1}, None),
        ("completions", {"prompt": [1, 2]}, None),
        ("completions", {"prompt": [[1, 2], [3]], "n": 2}, 4),
        ("completions", {"prompt": ["a", "b", "c"]}, 3),
        ("completions", {"prompt": []}, None),
        ("other", {"messages": [], "n": 2}, 2),
        ("other", {"n": True}, None),
        ("other", {"n": "3"}, None),
        ("other", {"n": -1}, None),
    ],
)
def test_one_room_per_sample(kind: Kind, body: dict[str, Any], samples: int | None) -> None:
    prefill, decode = sent(json.dumps(body).encode(), kind, port=None)
    assert prefill == decode
    if samples is None:
        assert (decode["bootstrap_host"], decode["bootstrap_port"], decode["bootstrap_room"]) == ("10.0.0.1", None, 100)
    else:
        assert decode["bootstrap_room"] == list(range(100, 100 + samples))
        assert decode["bootstrap_host"] == ["10.0.0.1"] * samples
        assert decode["bootstrap_port"] == [None] * samples


def test_ranks_reach_the_leg_they_are_meant_for() -> None:
    prefill, decode = sent(b'{"routed_dp_rank": 3, "disagg_prefill_dp_rank": 1}', "other")
    assert prefill["routed_dp_rank"] == 1
    assert "disagg_prefill_dp_rank" not in prefill
    assert (decode["routed_dp_rank"], decode["disagg_prefill_dp_rank"]) == (3, 1)
    prefill, decode = sent(b'{"routed_dp_rank": 3}', "other")
    assert prefill["routed_dp_rank"] == decode["routed_dp_rank"] == 3


@pytest.mark.parametrize(
    "raw",
    [b"", b"[]", b"null", b'"x"', b"{", b'{"a":}', b'{"a":1}}', b'{"a":1}{"b":2}', b"{'a':1}", b'{"a":NaN}',
     b"\xef\xbb\xbf{}", b'{"a":' + b"[" * 100_000, b"\xff\xfe"],
)  # fmt: skip
def test_what_is_not_a_json_object_is_refused(raw: bytes) -> None:
    with pytest.raises(BadRequest):
        splice.read(raw, "other")


@pytest.mark.parametrize("name", ROUTING)
def test_a_key_that_is_not_utf8_is_refused_where_keys_are_written_anew(name: str) -> None:
    raw = b'{"%b": 1, "\xff": 2}' % name.encode()
    with pytest.raises(BadRequest, match="not valid JSON"):
        splice.read(raw, "other")
    assert splice.read(raw.replace(name.encode(), b"x"), "other")  # passed on as it is: the worker's to judge


def test_samples_that_are_not_utf8_are_the_workers_to_refuse() -> None:
    assert splice.read(b'{"text": "a", "sampling_params": {"n": "\xff"}}', "generate").samples is None


def test_too_many_samples_are_refused_before_anybody_draws_rooms() -> None:
    with pytest.raises(BadRequest, match="1024"):
        splice.read(b'{"n": 1000000000}', "other")


@pytest.mark.parametrize(
    ("kind", "body", "merge"),
    [
        ("generate", {"text": "a", "return_logprob": True}, "generate"),
        ("generate", {"text": "a", "return_logprob": False}, ""),
        ("completions", {"prompt": "a", "echo": True, "logprobs": 1}, "completions"),
        ("completions", {"prompt": "a", "echo": True, "logprobs": 0}, "completions"),
        ("completions", {"prompt": "a", "echo": True}, ""),
        ("completions", {"prompt": "a", "logprobs": 1}, ""),
        ("other", {"logprobs": True}, ""),
    ],
)
def test_only_requests_for_prompt_logprobs_are_merged(kind: Kind, body: dict[str, Any], merge: str) -> None:
    assert splice.read(json.dumps(body).encode(), kind).merge == merge


def test_reading_does_not_build_the_prompt() -> None:
    """No growth beyond reading the bytes: a body of 8 MB takes milliseconds."""
    raw = b'{"messages":[{"role":"user","content":"' + b"word " * 1_600_000 + b'"}],"n":1}'
    started = time.perf_counter()
    splice.pair(splice.read(raw, "other"), "h", 1, [1])
    assert time.perf_counter() - started < 0.5
