"""Chat templates are rendered as Transformers renders them."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from baton.api.chat import ChatTemplate
from baton.base.errors import BadRequest, ConfigError

MESSAGES = [
    {"role": "system", "content": "Be <brief> & 'kind' 日本"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": None, "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": "é", "y": [1]}'}},
    ]},
    {"role": "tool", "content": "4"},
]  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "title": "é<>&"}}}]
TEMPLATES = {
    "chatml": (
        "{%- for m in messages %}\n    {{- '<|' + m.role + '|>' }}\n  {%- if m.content %}{{ m.content }}{% endif %}\n"
        "{% endfor %}\n{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
    "tools": "{% if tools %}{% for t in tools %}{{ t | tojson }}{{ t | tojson(indent=2) }}{% endfor %}{% endif %}",
    "tool calls": (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}"
        "{{ c.function.arguments.x }}{% endfor %}{% endfor %}"
    ),
    "loop controls": "{% for m in messages %}{% if loop.index == 3 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.role }}\n{% endgeneration %}{% endfor %}",
    "tokens": "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ documents }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "defined": "{% if enable_thinking is defined and not enable_thinking %}quiet{% else %}loud{% endif %}",
    "whitespace": "  {% if true %}\n  a\n  {% endif %}\n  b\n",
}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
def test_as_transformers(source: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    theirs: Any = [{**m} for m in MESSAGES]
    theirs[2]["tool_calls"] = [
        {**call, "function": {**call["function"], "arguments": json.loads(call["function"]["arguments"])}}
        for call in theirs[2]["tool_calls"]
    ]
    wanted, _ = render_jinja_template(
        conversations=[theirs], tools=TOOLS, chat_template=source, add_generation_prompt=True, **TOKENS
    )
    ours = ChatTemplate({"default": source}, TOKENS).render(MESSAGES, tools=TOOLS)
    assert ours == wanted[0]


def test_strftime() -> None:
    rendered = ChatTemplate({"default": "{{ strftime_now('%Y') }}"}, {}).render(MESSAGES)
    assert rendered == str(datetime.now().year)


def test_extra_arguments() -> None:
    template = ChatTemplate({"default": TEMPLATES["defined"]}, {})
    assert template.render(MESSAGES, enable_thinking=False) == "quiet"
    assert template.render(MESSAGES) == "loud"


def test_a_template_of_its_own_for_tools() -> None:
    template = ChatTemplate({"default": "plain", "tool_use": "tools"}, {})
    assert template.render(MESSAGES) == "plain"
    assert template.render(MESSAGES, tools=TOOLS) == "tools"


def test_content_parts() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert ChatTemplate({"default": "{{ messages[0].content }}"}, {}).render(parts) == "a\nb"
    looping = "{% for m in messages %}{% for part in m['content'] %}[{{ part.text }}]{% endfor %}{% endfor %}"
    assert ChatTemplate({"default": looping}, {}).render(parts) == "[a][b]"


def test_continuing_the_last_message() -> None:
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    template = ChatTemplate({"default": source}, {})
    messages = [{"role": "user", "content": "count"}, {"role": "assistant", "content": "one, two"}]
    rendered = template.render(messages, add_generation_prompt=False, continue_final_message=True)
    assert rendered == "<user>count</><assistant>one, two"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no system role') }}",
        "{{ messages[9].content.x }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ 1 + messages[0].content }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ],
)
def test_what_a_template_refuses_is_the_clients_fault(source: str) -> None:
    with pytest.raises(BadRequest):
        ChatTemplate({"default": source}, {}).render(MESSAGES)


def test_tool_arguments_that_are_not_json() -> None:
    call = {"function": {"name": "f", "arguments": "{"}}
    with pytest.raises(BadRequest, match="JSON"):
        ChatTemplate({"default": ""}, {}).render([{"role": "assistant", "tool_calls": [call]}])


def test_where_templates_come_from(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="no chat template"):
        ChatTemplate.load(tmp_path, {}).render(MESSAGES)
    settings: dict[str, object] = {"chat_template": "config"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert ChatTemplate.load(tmp_path, {}).render(MESSAGES) == "config"
    settings = {"chat_template": [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert ChatTemplate.load(tmp_path, {}).render(MESSAGES, tools=TOOLS) == "two"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert ChatTemplate.load(tmp_path, {}).render(MESSAGES) == "file"
    (tmp_path / "mine").write_text("mine")
    assert ChatTemplate.load(tmp_path, {}, str(tmp_path / "mine")).render(MESSAGES) == "mine"
    (tmp_path / "mine").write_text("{% if %}")
    with pytest.raises(ConfigError, match="Jinja"):
        ChatTemplate.load(tmp_path, {}, str(tmp_path / "mine"))
    with pytest.raises(ConfigError, match="cannot be read"):
        ChatTemplate.load(tmp_path, {}, str(tmp_path / "nothing"))


def test_the_tiny_model(tiny_model_dir: Path) -> None:
    from transformers import AutoTokenizer

    from baton.api.text import load_tokenizer

    theirs = AutoTokenizer.from_pretrained(tiny_model_dir)
    ours = load_tokenizer(tiny_model_dir)
    template = ChatTemplate.load(tiny_model_dir, ours.special_tokens)
    messages = [{"role": "user", "content": "hello ünï 🙂"}]
    text = template.render(messages)
    assert text == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.encode(text, special=False) == theirs.encode(text, add_special_tokens=False)
    assert ours.encode("hello there") == theirs.encode("hello there")


def test_smollm2(smollm2: Path) -> None:
    test_the_tiny_model(smollm2)
