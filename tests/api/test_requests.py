"""From bodies to jobs: plans, seeds, rooms."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.api.dialect import Dialect
from baton.api.job import Job, ModelContext, PDFields, tickets
from baton.api.openai import Chat, Completions
from baton.api.sampling import MAX_ROOM, Asked, Defaults, build, derived
from baton.api.sglang import Generate
from baton.base.errors import BadRequest
from baton.base.messages import Codec, Ticket, ToEngine

from .models import byte_level, context, write


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelContext:
    directory = tmp_path_factory.mktemp("model")
    write(byte_level(), directory, "{% for m in messages %}{{ m.content }}{% endfor %}")
    return context(directory)


def parse(dialect: Dialect, model: ModelContext, **body: object) -> Job:
    return dialect.parse(json.dumps(body).encode(), model, None)[0]


def test_defaults(model: ModelContext) -> None:
    completion = parse(Completions(), model, prompt="hello").generates(["a"], model)[0]
    assert completion.sampling.max_tokens == 16
    assert completion.sampling.temperature == 1.0
    assert completion.sampling.top_k == -1
    chat = parse(Chat(), model, messages=[{"role": "user", "content": "hello"}]).generates(["a"], model)[0]
    assert chat.sampling.max_tokens == model.longest - len(chat.tokens)
    native = parse(Generate(), model, text="hello").generates(["a"], model)[0]
    assert native.sampling.max_tokens == 128
    crowded = parse(Generate(), model, input_ids=[7] * 500).generates(["a"], model)[0]
    assert crowded.sampling.max_tokens == 12


def test_the_models_own_defaults(model: ModelContext, tmp_path: Path) -> None:
    settings = {"temperature": 0.6, "top_k": 20, "top_p": None, "min_p": "x", "do_sample": True}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    gentle = dataclasses.replace(model, defaults=Defaults.load(tmp_path))
    sampling = parse(Completions(), gentle, prompt="a").plans[0].sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.6, 20, 1.0, 0.0)
    assert parse(Completions(), gentle, prompt="a", temperature=0).plans[0].sampling.temperature == 0
    assert Defaults.load(tmp_path / "nowhere") == Defaults()


def test_min_tokens_lifts_the_default(model: ModelContext) -> None:
    assert parse(Completions(), model, prompt="a", min_tokens=40).generates(["a"], model)[0].sampling.max_tokens == 40


def test_all_fields_arrive(model: ModelContext) -> None:
    params = {
        "max_new_tokens": 9, "min_new_tokens": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1,
        "presence_penalty": 1, "frequency_penalty": -1, "repetition_penalty": 1.1, "logit_bias": {"5": 2.5},
        "stop": ["x"], "stop_token_ids": [8], "ignore_eos": True, "sampling_seed": 3, "regex": "a+",
        "skip_special_tokens": False, "no_stop_trim": True,
    }  # fmt: skip
    job = parse(Generate(), model, text="hello", sampling_params=params, priority=4, cache_salt="s")
    request = job.generates(["a"], model)[0]
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.min_tokens, sampling.temperature) == (9, 2, 0.5)
    assert (sampling.top_p, sampling.top_k, sampling.min_p) == (0.9, 7, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (1, -1, 1.1)
    assert sampling.logit_bias == ((5, 2.5),)
    assert (sampling.stop_token_ids, sampling.ignore_eos, sampling.seed) == ((8,), True, 3)
    assert sampling.grammar is not None
    assert (sampling.grammar.kind, sampling.grammar.source) == ("regex", "a+")
    assert (job.plans[0].stops, job.plans[0].keep_stop, job.plans[0].skip_special_tokens) == (("x",), True, False)
    assert (request.priority, request.cache_salt) == (4, "s")
    assert Codec(ToEngine).decode(Codec(ToEngine).encode(request)) == request


def test_the_openai_fields_arrive_too(model: ModelContext) -> None:
    body = {
        "max_tokens": 9, "min_tokens": 2, "temperature": 0, "top_p": 0.9, "seed": -5, "n": 2, "stop": "x",
        "logit_bias": {"5": -100}, "prompt": "hello", "logprobs": 3, "echo": True, "stream": True,
    }  # fmt: skip
    job = parse(Completions(), model, **body)
    requests = job.generates(["a", "b"], model)
    assert [request.sampling.logprobs for request in requests] == [3, 3]
    assert [request.sampling.prompt_logprobs for request in requests] == [3, 3]
    assert len({request.sampling.seed for request in requests}) == 2
    assert all(0 <= request.sampling.seed < 2**63 for request in requests)
    assert job.stream


def schema(**wrapper: object) -> dict[str, object]:
    return {"response_format": {"type": "json_schema", "json_schema": wrapper}}


@pytest.mark.parametrize(
    ("body", "kind", "source"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object", '{"type":"object"}'),
        (schema(name="x", schema={"a": 1}), "json_schema", '{"a":1}'),
        ({"guided_json": '{"a": 1}'}, "json_schema", '{"a":1}'),
        ({"guided_choice": ["a", "b"]}, "choice", '["a","b"]'),
        ({"guided_grammar": "start: A"}, "ebnf", "start: A"),
        ({"structured_outputs": {"regex": "a"}}, "regex", "a"),
        ({"structured_outputs": {"json_object": True}}, "json_object", '{"type":"object"}'),
        ({"json_schema": {"a": 1}}, "json_schema", '{"a":1}'),
        ({"response_format": {"type": "structural_tag", "x": 1}}, "structural_tag", '{"type":"structural_tag","x":1}'),
    ],
)  # fmt: skip
def test_grammars(model: ModelContext, body: dict[str, object], kind: str, source: str) -> None:
    grammar = parse(Completions(), model, prompt="a", **body).plans[0].sampling.grammar
    assert grammar is not None
    assert (grammar.kind, grammar.source) == (kind, source)


def test_text_format_is_no_grammar(model: ModelContext) -> None:
    assert parse(Completions(), model, prompt="a", response_format={"type": "text"}).plans[0].sampling.grammar is None


def test_chat_options(model: ModelContext) -> None:
    base = {
        "messages": [{"role": "user", "content": "hello"}],
        "tools": [{"type": "function", "function": {"name": "f"}}],
    }
    assert parse(Chat(), model, **base, tool_choice="none").n == 1
    plan = parse(Chat(), model, **base, logprobs=True).plans[0]
    assert plan.sampling.logprobs == 0
    assert parse(Chat(), model, **base, max_tokens=4, max_completion_tokens=5).plans[0].sampling.max_tokens == 5
    with pytest.raises(BadRequest, match="prompt_logprobs is not supported"):
        parse(Chat(), model, **base, prompt_logprobs=0)
    with pytest.raises(BadRequest, match="bad_words is not supported"):
        parse(Chat(), model, **base, bad_words=["x"])
    with pytest.raises(BadRequest, match="exclude"):
        parse(Chat(), model, **base, continue_final_message=True, add_generation_prompt=True)


def test_models(model: ModelContext) -> None:
    for name in ("m", "alias", "default", "unknown", "", None):
        Completions().parse(json.dumps({"prompt": "a", "model": name}).encode(), model, None)


# --- seeds ---------------------------------------------------------------------------------------------------------


def test_both_workers_draw_the_same_seed(model: ModelContext) -> None:
    """P and D parse the same body; nobody named a seed."""
    body = {"text": "hello", "bootstrap_room": 77, "bootstrap_host": "p", "sampling_params": {"n": 3}}
    once, again = (parse(Generate(), model, **body).generates(list("abc"), model) for _ in range(2))
    assert [r.sampling.seed for r in once] == [r.sampling.seed for r in again]
    assert len({r.sampling.seed for r in once}) == 3


def test_without_a_room_seeds_differ(model: ModelContext) -> None:
    seeds = {parse(Generate(), model, text="a").generates(["a"], model)[0].sampling.seed for _ in range(20)}
    assert len(seeds) == 20


@given(seed=st.integers(-(2**63), 2**64 - 1), n=st.integers(1, 128))
def test_samples_have_seeds_of_their_own(seed: int, n: int) -> None:
    plan = build(Asked(seed=seed, n=n), 10)
    seeds = [plan.sample(i, 1, 4, longest=99, default=None).seed for i in range(n)]
    assert len(set(seeds)) == n
    assert all(0 <= s < 2**63 for s in seeds)
    assert seeds[0] == seed & (2**63 - 1)


# --- rooms ---------------------------------------------------------------------------------------------------------


def rooms(model: ModelContext, prompts: int, n: int, **fields: object) -> list[int | None]:
    found = tickets(PDFields(**fields), prompts, n, model)  # type: ignore[arg-type]
    assert len(found) == prompts * n
    return [None if ticket is None else ticket.room for ticket in found]


def test_rooms(model: ModelContext) -> None:
    assert rooms(model, 2, 1) == [None, None]
    assert rooms(model, 1, 1, bootstrap_room=0) == [0]
    assert rooms(model, 3, 1, bootstrap_room=5) == [5, 6, 7]
    assert rooms(model, 2, 2, bootstrap_room=5) == [5, 6, 7, 8]
    assert rooms(model, 2, 1, bootstrap_room=MAX_ROOM - 1) == [MAX_ROOM - 1, 0]
    assert rooms(model, 2, 1, bootstrap_room=[9, 4]) == [9, 4]
    assert rooms(model, 1, 3, bootstrap_room=[9, 4, 2]) == [9, 4, 2]
    spread = rooms(model, 2, 2, bootstrap_room=[9, 10])
    assert spread == [9, derived(9, 1), 10, derived(10, 1)]
    assert len(set(spread)) == 4


def test_tickets(model: ModelContext) -> None:
    fields = PDFields(
        bootstrap_host=["a", None], bootstrap_port=[None, 9], bootstrap_room=[1, 2], prefill_data_parallel_rank=3
    )
    assert tickets(fields, 2, 1, model) == [
        Ticket(1, "a", model.bootstrap_port, 3),
        Ticket(2, model.bootstrap_host, 9, 3),
    ]
    scalar = PDFields(bootstrap_host="h", bootstrap_port=None, bootstrap_room=4, disagg_prefill_dp_rank=0)
    assert tickets(scalar, 1, 2, model) == [
        Ticket(4, "h", model.bootstrap_port, 0),
        Ticket(5, "h", model.bootstrap_port, 0),
    ]


@pytest.mark.parametrize(
    "fields",
    [
        {"bootstrap_room": [1, 2, 3]},
        {"bootstrap_room": 1, "bootstrap_host": ["a", "b", "c"]},
        {"bootstrap_room": 1, "bootstrap_port": [1, 2, 3]},
        {"bootstrap_room": MAX_ROOM},
        {"bootstrap_room": [-1, 3]},
        {"routed_dp_rank": 1},
        {"data_parallel_rank": 1},
    ],
)
def test_bad_rooms(model: ModelContext, fields: dict[str, object]) -> None:
    with pytest.raises(BadRequest):
        tickets(PDFields(**fields), 2, 1, model)  # type: ignore[arg-type]


def test_one_request_cannot_ask_for_everything(model: ModelContext) -> None:
    with pytest.raises(BadRequest, match="sequences"):
        parse(Completions(), model, prompt=["a"] * 100, n=100)


def test_a_model_without_tokenizer_takes_ids(tmp_path: Path) -> None:
    bare = ModelContext(("m",), context(tmp_path).tokenizer, context(tmp_path).chat, vocab_size=99, longest=50)
    assert parse(Generate(), bare, input_ids=[1, 2]).prompts[0].tokens == (1, 2)
    with pytest.raises(BadRequest, match="token ids"):
        parse(Generate(), bare, text="a")
