"""Whatever a client sends is understood or refused; nothing else is raised, and what is accepted can be answered."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.api.dialect import Dialect, Writer
from baton.api.job import Job, ModelContext
from baton.api.openai import Chat, ChatRequest, CompletionRequest, Completions
from baton.api.output import Output
from baton.api.sglang import Generate, GenerateRequest, SamplingParams
from baton.base.errors import ClientError
from baton.base.messages import Codec, Finish, ToEngine, TokenLogprob, Tokens, Usage

from .models import byte_level, context, write

numbers = st.integers(-(2**70), 2**70) | st.integers(-3, 300) | st.floats(allow_nan=False, allow_infinity=False)
words = st.sampled_from(["", "a", "hello there", "m", "system", "user", "json_object", "json_schema", "text", "\ud800"])
scalars = st.none() | st.booleans() | numbers | words
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3))
message = st.fixed_dictionaries({"role": words, "content": values}) | values
DIALECTS = {"completions": Completions(), "chat": Chat(), "generate": Generate()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelContext:
    directory: Path = tmp_path_factory.mktemp("model")
    write(byte_level(), directory, "{% for m in messages %}{{ m.content }}{% endfor %}")
    return context(directory)


def bodies(schema: type[msgspec.Struct], must: dict[str, st.SearchStrategy[object]]) -> st.SearchStrategy[object]:
    fields = dict.fromkeys(schema.__struct_fields__, values)
    return st.fixed_dictionaries(must, optional={k: v for k, v in fields.items() if k not in must})


BODIES = {
    "completions": bodies(CompletionRequest, {"prompt": st.just("hello") | values}),
    "chat": bodies(ChatRequest, {"messages": st.lists(message, max_size=3) | values}),
    "generate": bodies(
        GenerateRequest, {"sampling_params": bodies(SamplingParams, {}) | values, "text": words | values}
    ),
}


def answer(job: Job, writer: Writer, model: ModelContext) -> None:
    """A small answer through every door of the writer."""
    total = len(job.prompts) * job.n
    requests = job.generates([str(k) for k in range(total)], model)
    for request in requests:
        assert Codec(ToEngine).decode(Codec(ToEngine).encode(request)) == request
    outputs = [Output(k, "r", job.prompts[k // job.n], job.plans[k // job.n], model.tokenizer) for k in range(total)]
    for output, request in zip(outputs, requests, strict=True):
        wanted = request.sampling.logprobs is not None
        for last, token in enumerate((70, 71)):
            logprobs = (TokenLogprob(-1.0, token, ((-1.0, token),)),) if wanted else ()
            end = (Finish("length"), Usage(len(request.tokens), 2, 0)) if last else (None, None)
            text = output.take(Tokens("", (token,), logprobs, finish=end[0], usage=end[1]))
            for line in writer.delta(output, text).splitlines():
                assert not line or msgspec.json.decode(line.removeprefix(b"data: "))
        assert output.ended()
    assert msgspec.json.decode(writer.body(outputs))
    assert writer.end(outputs).endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("name", DIALECTS)
@settings(max_examples=60)
@given(data=st.data())
def test_any_values_in_known_fields(model: ModelContext, name: str, data: st.DataObject) -> None:
    body = data.draw(BODIES[name])
    run(DIALECTS[name], model, _encoded(body))


@pytest.mark.parametrize("name", DIALECTS)
@given(body=st.binary(max_size=60))
def test_any_bytes(model: ModelContext, name: str, body: bytes) -> None:
    run(DIALECTS[name], model, body)


SENSIBLE: dict[str, st.SearchStrategy[object]] = {
    "n": st.integers(1, 3),
    "stream": st.booleans(),
    "echo": st.booleans(),
    "max_tokens": st.integers(1, 50),
    "temperature": st.floats(0, 2),
    "stop": st.just("zz") | st.just(["zz", "y"]),
    "seed": st.integers(-(2**63), 2**63),
    "return_token_ids": st.booleans(),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans(), "continuous_usage_stats": st.booleans()}),
    "bootstrap_room": st.integers(0, 2**63 - 1),
    "return_logprob": st.booleans(),
    "logprob_start_len": st.integers(-1, 5),
    "top_logprobs_num": st.integers(0, 5),
    "return_text_in_logprobs": st.booleans(),
    "ignore_eos": st.booleans(),
}
REQUIRED: dict[str, dict[str, st.SearchStrategy[object]]] = {
    "completions": {"prompt": st.sampled_from(["hello", ["a", "b"], [5, 6], [[5], [6]]])},
    "chat": {"messages": st.just([{"role": "user", "content": "hello"}])},
    "generate": {"text": st.sampled_from(["hello", ["a", "b"]])},
}
OWN: dict[str, dict[str, st.SearchStrategy[object]]] = {
    "completions": {"logprobs": st.integers(0, 5)},
    "chat": {"logprobs": st.just(True), "top_logprobs": st.integers(0, 5)},
    "generate": {"sampling_params": st.fixed_dictionaries({}, optional={"n": st.integers(1, 3)})},
}


@pytest.mark.parametrize("name", DIALECTS)
@given(data=st.data())
def test_sensible_requests_are_answered(model: ModelContext, name: str, data: st.DataObject) -> None:
    optional = {**SENSIBLE, **OWN[name]}
    body = data.draw(st.fixed_dictionaries(REQUIRED[name], optional=optional))
    if name == "chat" and "top_logprobs" in body:
        body["logprobs"] = True
    job, writer = DIALECTS[name].parse(_encoded(body), model, None)
    answer(job, writer, model)


def run(dialect: Dialect, model: ModelContext, body: bytes) -> None:
    try:
        job, writer = dialect.parse(body, model, None)
    except ClientError:
        return
    answer(job, writer, model)


def _encoded(body: object) -> bytes:
    return json.dumps(body).encode()
