"""Calls in a model's text: each format, what is nearly one, and that the way the text is cut changes nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.api.answers import AnswerFormat, joined
from baton.api.reasoning import REASONING_FORMATS, ReasoningFormat
from baton.api.tool_calls import FORCED, TOOL_FORMATS, Parsed, ToolFormat
from baton.base.config import WorkerConfig

NAMES = frozenset({"f", "get_weather", "ns.g"})
FORMATS = {**TOOL_FORMATS, "forced": FORCED}
Calls = list[tuple[str, str]]


def read(format: ToolFormat, text: str, limit: int | None = None) -> tuple[str, Calls]:
    parsed = AnswerFormat(tools=format, names=NAMES, limit=limit).read(text)
    assert [call.index for call in parsed.calls] == list(range(len(parsed.calls)))
    return parsed.content, [(call.name, call.arguments) for call in parsed.calls]


def pieces(format: AnswerFormat, chunks: Sequence[str]) -> Parsed:
    answer, whole = format.answer(), Parsed()
    for chunk in chunks:
        whole = joined(whole, answer.feed(chunk))
    return joined(whole, answer.finish())


X = ("f", '{"x": 1}')
G = ("ns.g", "{}")


@pytest.mark.parametrize(
    ("name", "text", "content", "calls"),
    [
        ("hermes", '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>', "", [X]),
        ("hermes", 'Well.\n<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>\nSo.', "Well.\nSo.", [X]),
        ("hermes", '<tool_call>{"arguments": {"x": 1}, "id": [7], "name": "f"}</tool_call>', "", [X]),
        ("hermes", '<tool_call>{"name": "ns.g"}</tool_call>', "", [G]),
        ("hermes", '<tool_call>{"name": "ns.g", "arguments": null}</tool_call>', "", [G]),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>', "", [X]),
        ("hermes", '<tool_call>{"n\\u0061me": "\\u0066", "parameters": {"x": 1}}</tool_call>', "", [X]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": "</tool_call>}"}}</tool_call>', "",
         [("f", '{"x": "</tool_call>}"}')]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>\n'
         '<tool_call>{"name": "ns.g", "arguments": {}}</tool_call>', "", [X, G]),
        ("llama3", '{"name": "f", "parameters": {"x": 1}}', "", [X]),
        ("llama3", '<|python_tag|>{"name": "f", "parameters": {"x": 1}}; {"name": "ns.g"}', "", [X, G]),
        ("llama3", 'I think <|python_tag|>{"name": "f", "parameters": {"x": 1}}', "I think", [X]),
        ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}}, {"name": "ns.g", "arguments": {}}]', "",
         [X, G]),
        ("mistral", '[TOOL_CALLS]f[ARGS]{"x": 1}[TOOL_CALLS]ns.g{}', "", [X, G]),
        ("mistral", '[TOOL_CALLS]f[CALL_ID]aB3[ARGS]{"x": 1}', "", [X]),
        ("pythonic", "[f(x=1), ns.g()]", "", [X, G]),
        ("pythonic", "<|python_start|>[f(x=1)]<|python_end|>", "", [X]),
        ("pythonic", "[f(a='it\\'s )', b=[None, True, -1.5], c={'k': \"ü\"})]", "",
         [("f", '{"a": "it\'s )", "b": [null, true, -1.5], "c": {"k": "ü"}}')]),
        ("forced", '[{"name": "f", "parameters": {"x": 1}}, {"name": "ns.g", "parameters": {}}]', "", [X, G]),
    ],
)  # fmt: skip
def test_calls(name: str, text: str, content: str, calls: Calls) -> None:
    assert read(FORMATS[name], text) == (content, calls)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", "<tool_call>no JSON</tool_call>"),
        ("hermes", "<tool_call>"),
        ("hermes", "a <tool_cal"),
        ("hermes", '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": 1, "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": 12}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": "no JSON"}</tool_call>'),
        ("hermes", '<tool_call>{"arguments": {"x": 1}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f",, "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "name": "f", "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": nul'),
        ("hermes", "<tool_call>[]</tool_call>"),
        ("llama3", '  {"answer": 42}'),
        ("llama3", '{"name": "Bob", "age": 3}'),
        ("llama3", 'It is {"name": "f", "parameters": {}}'),
        ("llama3", "<|python_tag|>print(1)"),
        ("mistral", "[TOOL_CALLS] f and g"),
        ("mistral", '[TOOL_CALLS]unknown[ARGS]{"x": 1}'),
        ("mistral", "[TOOL_CALLS]" + "f" * 1000 + "{}"),
        ("pythonic", "[1] Bob et al."),
        ("pythonic", "[f](http://x)"),
        ("pythonic", "[f(1)]"),
        ("pythonic", "[f(**{})]"),
        ("pythonic", "[f(x=open('y'))]"),
        ("pythonic", "[f(x=1e999)]"),
        ("pythonic", "[f(x={1, 2})]"),
        ("pythonic", "[f(x='\\d' 1)]"),
        ("pythonic", "[f(x=" + "-" * 20000 + "1)]"),
        ("pythonic", "[f(x=" + "[" * 500 + "]" * 500 + ")]"),
        ("forced", "[]"),
    ],
)
def test_what_is_no_call_is_content_to_the_letter(name: str, text: str) -> None:
    assert read(FORMATS[name], text) == (text, [])


@pytest.mark.parametrize(
    ("name", "text", "content", "calls"),
    [
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": 1}</tool_call> so', "so", [X]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": 1}}}</tool_call>', "}</tool_call>", [X]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": 1', "", [("f", '{"x": 1')]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": 1}} </tool', " </tool", [X]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": 1}} </tool _call>', " </tool _call>", [X]),
        ("hermes", '<tool_call>no<tool_call>{"name": "f", "arguments": {"x": 1}}', "<tool_call>no", [X]),
        ("hermes", '<tool_call><tool_call>{"name": "f", "arguments": {"x": 1}}', "<tool_call>", [X]),
        ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {"x": 1}}, oh', ", oh", [X]),
        ("llama3", '{"name": "f", "parameters": {"x": 1}}; and', "; and", [X]),
        ("pythonic", "[f(x=1), g(2)] and", ", g(2)] and", [X]),
    ],
)
def test_what_has_begun_as_a_call_stays_one_and_the_rest_is_content(
    name: str, text: str, content: str, calls: Calls
) -> None:
    assert read(FORMATS[name], text) == (content, calls)


def test_a_client_that_takes_one_call_gets_one() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>\n<tool_call>{"name": "ns.g"}</tool_call> Done.'
    assert read(TOOL_FORMATS["hermes"], text, limit=1) == ("Done.", [X])
    assert read(TOOL_FORMATS["hermes"], "So. " + text, limit=1) == ("So. Done.", [X])


def test_arguments_stream_as_they_come() -> None:
    answer = AnswerFormat(tools=TOOL_FORMATS["hermes"], names=NAMES).answer()
    seen = [answer.feed(piece).calls for piece in ('<tool_call>{"name": "f", "argum', 'ents": {"x"', ': "y', '"}}</t')]
    assert [[(call.name, call.arguments) for call in calls] for calls in seen] == [
        [], [("f", '{"x"')], [("", ': "y')], [("", '"}')],
    ]  # fmt: skip
    assert answer.called


def test_the_choices_of_the_command_line_are_the_tables() -> None:
    choices = WorkerConfig.__dataclass_fields__
    assert choices["tool_call_parser"].metadata["choices"] == ("none", *TOOL_FORMATS)
    assert choices["reasoning_parser"].metadata["choices"] == ("none", *REASONING_FORMATS)


# --- however it is cut ---------------------------------------------------------------------------------------------

FRAGMENTS = [
    "<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "<|python_start|>", "<|python_end|>",
    '{"name": "f"', '"parameters": ', '{"x": 1}', '{"name": "f", "arguments": {"x": "}"}}', "f(x=1)",
    "[f(a='b')", "ns.g", "<think>", "</think>",
    "[", "]", "{", "}", ",", ";", '"', "'", "\\", " ", "\n", "text", "(", ")", "<", ":", "ü", "1",
]  # fmt: skip
texts = st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join)
formats = st.builds(
    AnswerFormat,
    reasoning=st.none() | st.sampled_from(list(REASONING_FORMATS.values())),
    thinking=st.booleans(),
    tools=st.none() | st.sampled_from(list(FORMATS.values())),
    names=st.just(NAMES),
    limit=st.none() | st.just(1),
)


@given(format=formats, text=texts, data=st.data())
def test_cuts_change_nothing(format: AnswerFormat, text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = format.read(text)
    assert pieces(format, chunks) == whole
    assert pieces(format, list(text)) == whole


@given(format=st.sampled_from(list(FORMATS.values())), text=texts | st.text())
def test_without_a_call_nothing_is_lost(format: ToolFormat, text: str) -> None:
    content, calls = read(format, text)
    if not calls:
        assert content == text
    assert sum(map(len, content.split())) <= len(text)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
calls_made = st.lists(
    st.tuples(
        st.sampled_from(sorted(NAMES)), st.dictionaries(st.from_regex("[a-z]{1,5}", fullmatch=True), json_values)
    ),
    min_size=1,
    max_size=3,
)
words = st.text(st.characters(exclude_characters="<[{", exclude_categories=("Cs",))).map(str.strip)


def as_json(calls: list[tuple[str, object]], key: str) -> list[str]:
    return [json.dumps({"name": name, key: arguments}) for name, arguments in calls]


WRITERS = {
    "hermes": lambda calls: "\n".join(f"<tool_call>\n{c}\n</tool_call>" for c in as_json(calls, "arguments")),
    "llama3": lambda calls: "<|python_tag|>" + "; ".join(as_json(calls, "parameters")),
    "mistral": lambda calls: f"[TOOL_CALLS][{', '.join(as_json(calls, 'arguments'))}]",
    "pythonic": lambda calls: (
        "<|python_start|>["
        + ", ".join(f"{name}({', '.join(f'p_{k}={v!r}' for k, v in values.items())})" for name, values in calls)
        + "]<|python_end|>"
    ),
}


@pytest.mark.parametrize("name", WRITERS)
@given(before=words, calls=calls_made)
def test_what_models_write_is_read(name: str, before: str, calls: list[tuple[str, dict[str, object]]]) -> None:
    content, found = read(FORMATS[name], before + WRITERS[name](calls))
    assert content == before
    prefix = "p_" if name == "pythonic" else ""
    assert [(n, json.loads(a)) for n, a in found] == [
        (n, {prefix + k: v for k, v in arguments.items()}) for n, arguments in calls
    ]


# --- thoughts ------------------------------------------------------------------------------------------------------

QWEN, R1 = REASONING_FORMATS["qwen3"], REASONING_FORMATS["deepseek-r1"]


@pytest.mark.parametrize(
    ("prompt", "format", "text", "reasoning", "content"),
    [
        ("", QWEN, "<think>\nhm\n</think>\n\nyes", "hm", "yes"),
        ("", QWEN, "\n<think>hm", "hm", ""),
        ("", QWEN, "yes <think>no</think>", "", "yes <think>no</think>"),
        ("", QWEN, "<thin", "", "<thin"),
        ("", QWEN, "<think>a</thi", "a</thi", ""),
        ("", QWEN, "<think></think>  code", "", "  code"),
        ("<think>\n", QWEN, "hm\n\nso</think>yes", "hm\n\nso", "yes"),
        ("<think>\n\n</think>\n\n", QWEN, "yes", "", "yes"),
        ("", R1, "hm</think>\nyes", "hm", "yes"),
        ("", R1, "<think>hm</think>yes", "hm", "yes"),
        ("", R1, "hm", "hm", ""),
        ("<think></think>", R1, "yes", "", "yes"),
    ],
)
def test_thoughts(prompt: str, format: ReasoningFormat, text: str, reasoning: str, content: str) -> None:
    parsed = AnswerFormat(reasoning=format, thinking=format.opened_by(prompt)).read(text)
    assert (parsed.reasoning, parsed.content) == (reasoning, content)


def test_thoughts_of_calls_are_thoughts() -> None:
    call = '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'
    format = AnswerFormat(QWEN, tools=TOOL_FORMATS["hermes"], names=NAMES)
    parsed = format.read(f"<think>I could say {call}</think>\n\n{call}")
    assert parsed.reasoning == f"I could say {call}"
    assert (parsed.content, len(parsed.calls)) == ("", 1)
