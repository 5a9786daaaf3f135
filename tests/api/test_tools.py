"""Tools in chat requests: what the model is shown, what it is held to, and what the client gets."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.api.dialect import Writer
from baton.api.job import Job, ModelContext
from baton.api.openai import Chat
from baton.api.output import Output
from baton.api.reasoning import REASONING_FORMATS
from baton.api.tool_calls import TOOL_FORMATS
from baton.api.tools import tool_use
from baton.base.errors import BadRequest
from baton.base.messages import Finish, TokenLogprob, Tokens, Usage

from .models import byte_level, context, write

TEMPLATE = "{% if tools %}[{% for t in tools %}{{ t.function.name }} {% endfor %}]{% endif %}{{ messages[0].content }}"
ARGUMENTS = {"type": "object", "properties": {"city": {"$ref": "#/$defs/City"}}, "$defs": {"City": {"type": "string"}}}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "get_weather", "description": "...", "parameters": ARGUMENTS}},
    {"type": "function", "function": {"name": "now"}},
]
CALL = '<tool_call>{"name": "get_weather", "arguments": {"city": "Bern"}}</tool_call>'


def named(name: str) -> dict[str, object]:
    return {"type": "function", "function": {"name": name}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelContext:
    directory: Path = tmp_path_factory.mktemp("model")
    write(byte_level(), directory, TEMPLATE)
    here = context(directory)
    return dataclasses.replace(here, tools=TOOL_FORMATS["hermes"], reasoning=REASONING_FORMATS["qwen3"], longest=4096)


def parse(model: ModelContext, **body: object) -> tuple[Job, Writer]:
    body = {"messages": [{"role": "user", "content": "hello"}], "tools": TOOLS, **body}
    return Chat().parse(json.dumps(body).encode(), model, None)


def prompt(model: ModelContext, job: Job) -> str:
    return model.tokenizer.decode(job.prompts[0].tokens)


# --- the request ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "shown"),
    [
        (None, "[get_weather now ]hello"),
        ("auto", "[get_weather now ]hello"),
        ("none", "hello"),
        ("required", "[get_weather now ]hello"),
        (named("now"), "[now ]hello"),
    ],
)
def test_which_tools_the_model_is_shown(model: ModelContext, choice: object, shown: str) -> None:
    job, _ = parse(model, tool_choice=choice)
    assert prompt(model, job) == shown
    assert (job.plans[0].sampling.grammar is not None) == (choice not in (None, "auto", "none"))


def test_the_grammar_of_a_choice() -> None:
    grammar = tool_use(TOOLS, "required", False, None).grammar
    assert grammar is not None
    schema = json.loads(grammar.source)
    assert (schema["minItems"], schema["maxItems"]) == (1, 1)
    assert [call["properties"]["name"]["const"] for call in schema["items"]["anyOf"]] == ["get_weather", "now"]
    assert schema["$defs"]["0"]["properties"]["city"]["$ref"] == "#/$defs/0/$defs/City"
    assert schema["$defs"]["1"] == {"type": "object", "properties": {}, "additionalProperties": False}
    alone = tool_use(TOOLS, named("now"), None, None)
    assert alone.grammar is not None
    assert "get_weather" not in alone.grammar.source
    assert tool_use(TOOLS, "required", None, None).grammar != grammar
    assert ARGUMENTS["properties"] == {"city": {"$ref": "#/$defs/City"}}, "the client's schema was changed"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"tool_choice": "sometimes"}, 'tool_choice is "none", "auto", "required" or'),
        ({"tool_choice": {"type": "allowed_tools"}}, 'tool_choice is "none", "auto", "required" or'),
        ({"tool_choice": named("sing")}, "not in tools; there: get_weather, now"),
        ({"tool_choice": "required", "tools": None}, "not in tools; there: none"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "only one of tool_choice, response"),
        ({"tools": [{"type": "function"}]}, "a tool is"),
        ({"tools": [{"type": "retrieval", "function": {"name": "f"}}]}, "a tool is"),
        ({"tools": [{"function": {"name": "f", "parameters": [1]}}]}, "parameters are a JSON schema"),
    ],
)
def test_what_cannot_be_chosen(model: ModelContext, body: dict[str, object], words: str) -> None:
    with pytest.raises(BadRequest, match=words):
        parse(model, **body)


def test_markers_that_are_special_tokens_are_asked_for(model: ModelContext) -> None:
    mistral = dataclasses.replace(model, tools=TOOL_FORMATS["mistral"])
    assert not parse(mistral)[0].plans[0].skip_special_tokens
    assert parse(mistral, tools=None)[0].plans[0].skip_special_tokens
    assert parse(mistral, tool_choice="none")[0].plans[0].skip_special_tokens
    assert parse(model)[0].plans[0].skip_special_tokens


# --- the answer ----------------------------------------------------------------------------------------------------


def answer(model: ModelContext, text: str, finish: str = "stop", **body: object) -> dict[str, Any]:
    """The choice of a whole answer, after the same one was streamed and put together to the same."""
    whole = reply(model, text, finish, **body)
    streamed = stream(model, text, finish, **body)
    for call in whole["message"].get("tool_calls", []) + streamed["message"].get("tool_calls", []):
        assert len(call.pop("id")) >= 9
    assert streamed == whole
    return whole


def outputs(model: ModelContext, job: Job, text: str, finish: str) -> tuple[Output, list[Tokens]]:
    tokens = model.tokenizer.encode(text)
    logprobs = [(TokenLogprob(-1.0, token),) if job.plans[0].sampling.logprobs is not None else () for token in tokens]
    messages = [Tokens("", (token,), one) for token, one in zip(tokens, logprobs, strict=True)]
    usage = Usage(len(job.prompts[0].tokens), len(tokens), 0)
    messages.append(Tokens("", (), finish=Finish(finish), usage=usage))  # type: ignore[arg-type]
    return Output(0, "r", job.prompts[0], job.plans[0], model.tokenizer), messages


def reply(model: ModelContext, text: str, finish: str, **body: object) -> dict[str, Any]:
    job, writer = parse(model, **body)
    output, messages = outputs(model, job, text, finish)
    for message in messages:
        output.take(message)
    choice: dict[str, Any] = json.loads(writer.body([output]))["choices"][0]
    return {"message": choice["message"], "finish_reason": choice["finish_reason"], "logprobs": choice["logprobs"]}


def stream(model: ModelContext, text: str, finish: str, **body: object) -> dict[str, Any]:
    job, writer = parse(model, **body)
    output, messages = outputs(model, job, text, finish)
    events = b"".join(writer.delta(output, output.take(message)) for message in messages)
    return together([json.loads(line[6:])["choices"][0] for line in events.decode().splitlines() if line])


def together(choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """As clients put a stream together."""
    message: dict[str, Any] = {"role": "assistant", "content": "", "reasoning_content": "", "tool_calls": []}
    logprobs: list[Any] = []
    for choice in choices:
        delta = choice["delta"]
        for field in ("content", "reasoning_content"):
            message[field] += delta.get(field, "")
        for piece in delta.get("tool_calls", []):
            if piece["index"] == len(message["tool_calls"]):
                assert piece["type"] == "function"
                assert piece["function"]["name"]
                message["tool_calls"].append({"id": piece["id"], "type": "function", "function": piece["function"]})
            else:
                assert set(piece) == {"index", "function"}
                message["tool_calls"][piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]
        if choice["logprobs"] is not None:
            logprobs += choice["logprobs"]["content"]
    if not message["content"] and (message["tool_calls"] or message["reasoning_content"]):
        message["content"] = None
    for field in ("reasoning_content", "tool_calls"):
        if not message[field]:
            del message[field]
    reasons = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    assert len(reasons) == 1
    return {
        "message": message,
        "finish_reason": reasons[0],
        "logprobs": {"content": logprobs, "refusal": None} if logprobs else None,
    }


def call_of(name: str, arguments: str) -> dict[str, object]:
    return {"type": "function", "function": {"arguments": arguments, "name": name}}


WEATHER = call_of("get_weather", '{"city": "Bern"}')


@pytest.mark.parametrize(
    ("text", "finish", "body", "message", "reason"),
    [
        (CALL, "stop", {}, {"content": None, "tool_calls": [WEATHER]}, "tool_calls"),
        (f"So: {CALL}\n{CALL}", "stop", {}, {"content": "So:", "tool_calls": [WEATHER, WEATHER]}, "tool_calls"),
        (f"{CALL}{CALL}", "stop", {"parallel_tool_calls": False},
         {"content": None, "tool_calls": [WEATHER]}, "tool_calls"),
        (CALL.partition("Bern")[0], "length", {},
         {"content": None, "tool_calls": [call_of("get_weather", '{"city": "')]}, "length"),
        (CALL[:30], "length", {}, {"content": CALL[:30]}, "length"),
        ("Hello.", "stop", {}, {"content": "Hello."}, "stop"),
        (CALL, "stop", {"tool_choice": "none"}, {"content": CALL}, "stop"),
        (CALL, "stop", {"tools": None}, {"content": CALL}, "stop"),
        (CALL, "stop", {"guided_regex": ".*"}, {"content": CALL}, "stop"),
        (f"<think>\nhm\n</think>\n\n{CALL}", "stop", {},
         {"content": None, "reasoning_content": "hm", "tool_calls": [WEATHER]}, "tool_calls"),
        ("<think>hm</think>yes", "stop", {}, {"content": "yes", "reasoning_content": "hm"}, "stop"),
        ("<think>hm</think>yes", "stop", {"separate_reasoning": False}, {"content": "<think>hm</think>yes"}, "stop"),
        ("<think>hm", "length", {}, {"content": None, "reasoning_content": "hm"}, "length"),
        ('[{"name": "get_weather", "parameters": {"city": "Bern"}}]', "stop", {"tool_choice": "required"},
         {"content": None, "tool_calls": [WEATHER]}, "tool_calls"),
        ('[{"name": "now", "parameters": {}}]', "stop", {"tool_choice": named("now")},
         {"content": None, "tool_calls": [call_of("now", "{}")]}, "tool_calls"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("rich", [{}, {"logprobs": True}, {"stream_options": {"continuous_usage_stats": True}}])
def test_answers(
    model: ModelContext,
    text: str,
    finish: str,
    body: dict[str, object],
    message: dict[str, object],
    reason: str,
    rich: dict[str, object],
) -> None:
    found = answer(model, text, finish, **body, **rich)
    assert found["message"] == {"role": "assistant", **message}
    assert found["finish_reason"] == reason
    if "logprobs" in rich:
        assert len(found["logprobs"]["content"]) == len(model.tokenizer.encode(text))


def test_a_worker_without_parsers(model: ModelContext) -> None:
    plain = dataclasses.replace(model, tools=None, reasoning=None)
    assert answer(plain, f"<think>hm</think>{CALL}")["message"]["content"] == f"<think>hm</think>{CALL}"
    forced = answer(plain, '[{"name": "now", "parameters": {}}]', tool_choice="required")
    assert forced["message"]["tool_calls"] == [call_of("now", "{}")]


def test_thoughts_that_the_prompt_has_begun(model: ModelContext) -> None:
    messages = [{"role": "user", "content": "hello<think>\n"}]
    assert answer(model, "hm</think>yes", messages=messages)["message"]["reasoning_content"] == "hm"
    constrained = answer(model, "yes", messages=messages, guided_choice=["yes"])
    assert constrained["message"]["content"] == "yes"


def test_ids_that_mistrals_template_takes(model: ModelContext) -> None:
    mistral = dataclasses.replace(model, tools=TOOL_FORMATS["mistral"])
    calls = reply(mistral, '[TOOL_CALLS][{"name": "now", "arguments": {}}]', "stop")["message"]["tool_calls"]
    assert len(calls[0]["id"]) == 9
    assert calls[0]["id"].isalnum()


@given(text=st.lists(st.sampled_from([CALL, "<think>", "</think>", "hello", "\n", "<tool_call>", "{"])).map("".join))
def test_a_stream_is_the_whole(model: ModelContext, text: str) -> None:
    answer(model, text)
