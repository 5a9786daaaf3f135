"""Chat messages to one text, through the model's own Jinja template in a sandbox.

Templates are written for Transformers; this renders them as it does: trimmed blocks, loop controls, `generation`
blocks, `raise_exception`, `strftime_now`, and a `tojson` that keeps letters as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from baton.api.text import read_json
from baton.base.errors import BadRequest, ConfigError


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks what the assistant says (for training); served as it is."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own way to declare tags

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


class ChatTemplate:
    """The templates of one model: `default`, and others by name (`tool_use`)."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        environment = _environment()
        try:
            self._templates = {name: environment.from_string(source) for name, source in sources.items()}
            self._reads_parts = {name: _loops_over_content(environment, text) for name, text in sources.items()}
        except jinja2.TemplateError as error:
            raise ConfigError(f"the chat template is not valid Jinja: {error}") from error
        self._special_tokens = dict(special_tokens)

    @classmethod
    def load(cls, directory: str | Path, special_tokens: Mapping[str, str], override: str = "") -> ChatTemplate:
        """From `override` (a file), else chat_template.jinja, chat_template.json or tokenizer_config.json.

        A model without a template gives an object that refuses to render. Raises `ConfigError`.
        """
        if override:
            return cls({"default": _read(Path(override))}, special_tokens)
        return cls(_sources(Path(directory)), special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **extra: Any,
    ) -> str:
        """The prompt text. Raises `BadRequest` if the template refuses the messages, or there is none."""
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        template = self._templates.get(name)
        if template is None:
            raise BadRequest("this model has no chat template; use /v1/completions", param="messages")
        conversation = [_message(message, index, self._reads_parts[name]) for index, message in enumerate(messages)]
        values = {"documents": None, **self._special_tokens, **extra, "messages": conversation, "tools": tools or None}
        try:
            text = template.render(values, add_generation_prompt=add_generation_prompt)
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            KeyError,
            AttributeError,
            OverflowError,
            RecursionError,
        ) as error:
            raise BadRequest(f"the chat template refuses these messages: {error}", param="messages") from error
        return _cut_after(text, conversation[-1].get("content")) if continue_final_message else text


def _loops_over_content(environment: jinja2.Environment, source: str) -> bool:
    """Does the template walk through `message.content` as a list of parts, or expect a string?"""
    for loop in environment.parse(source).find_all(nodes.For):
        match loop.iter:
            case nodes.Getattr(attr="content"):
                return True
            case nodes.Getitem(arg=nodes.Const(value="content")):
                return True
    return False


def _message(message: Mapping[str, Any], index: int, reads_parts: bool) -> dict[str, Any]:
    """The message as templates expect it: content as text (or parts, if the template reads them), tool calls'
    arguments as objects."""
    changed = dict(message)
    content = message.get("content")
    if isinstance(content, list):
        parts = [_text_of(part, index) for part in content]
        changed["content"] = [{"type": "text", "text": text} for text in parts] if reads_parts else "\n".join(parts)
    elif content is not None and not isinstance(content, str):
        raise BadRequest("content must be a string or a list of text parts", param=f"messages[{index}].content")
    if message.get("tool_calls"):
        changed["tool_calls"] = [_tool_call(call, index) for call in message["tool_calls"]]
    return changed


def _text_of(part: Any, index: int) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type") in ("text", "input_text", "refusal", "output_text"):
        text = part.get("text", part.get("refusal"))
        if isinstance(text, str):
            return text
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise BadRequest(f"content part {kind!r} is not supported; this model reads text", param=f"messages[{index}]")


def _tool_call(call: Any, index: int) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise BadRequest("a tool call needs a function", param=f"messages[{index}].tool_calls")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError as error:
            raise BadRequest("tool call arguments are not JSON", param=f"messages[{index}].tool_calls") from error
    return {**call, "function": {**function, "arguments": arguments}}


def _cut_after(text: str, content: Any) -> str:
    """The text up to the end of the last message's content: the model goes on from there."""
    wanted = content.strip() if isinstance(content, str) else ""
    at = text.rfind(wanted)
    if not wanted or at < 0:
        raise BadRequest("continue_final_message needs a last message with text", param="continue_final_message")
    return text[: at + len(wanted)]


def _sources(directory: Path) -> dict[str, str]:
    sources: dict[str, str] = {}
    declared = read_json(directory / "tokenizer_config.json").get("chat_template")
    if isinstance(declared, str):
        sources["default"] = declared
    elif isinstance(declared, list):
        sources |= {entry["name"]: entry["template"] for entry in declared}
    in_json = read_json(directory / "chat_template.json").get("chat_template")
    if isinstance(in_json, str):
        sources["default"] = in_json
    for path in sorted(directory.glob("additional_chat_templates/*.jinja")):
        sources[path.stem] = _read(path)
    if (directory / "chat_template.jinja").exists():
        sources["default"] = _read(directory / "chat_template.jinja")
    return sources


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"chat template {path} cannot be read: {error}") from error
