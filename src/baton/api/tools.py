"""What a chat request says of tools: which are shown to the model, which it may or must call, and how it is held to it.

| tool_choice | shown | the answer |
|---|---|---|
| `none` | none | text |
| `auto`, or nothing | all | the model decides; calls are found by the worker's parser, if it has one |
| `required` | all | a grammar: a JSON array of one call or more, arguments by the tools' schemas |
| a name | that one | a grammar: a JSON array of one call of it |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from baton.api.tool_calls import FORCED, ToolFormat
from baton.base.errors import BadRequest
from baton.base.messages import Grammar

Tool = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ToolUse:
    shown: list[Tool] | None = None
    names: frozenset[str] = frozenset()
    format: ToolFormat | None = None
    """Where to look for calls; None: the answer is text."""
    grammar: Grammar | None = None
    limit: int | None = None


def tool_use(
    tools: Sequence[Tool] | None, choice: str | Tool | None, parallel: bool | None, parser: ToolFormat | None
) -> ToolUse:
    """Raises `BadRequest` for tools without a name and for choices that cannot be made."""
    limit = 1 if parallel is False else None
    offered = {_name(tool, index): tool for index, tool in enumerate(tools or ())}
    names = frozenset(offered)
    match choice:
        case None | "auto":
            return ToolUse(list(offered.values()) or None, names, parser if offered else None, None, limit)
        case "none":
            return ToolUse()
        case "required" if offered:
            return ToolUse(list(offered.values()), names, FORCED, forced(offered, limit), limit)
        case {"type": "function", "function": {"name": str(name)}} if name in offered:
            only = {name: offered[name]}
            return ToolUse([offered[name]], frozenset(only), FORCED, forced(only, 1), 1)
        case "required" | {"type": "function", "function": {"name": str()}}:
            known = ", ".join(offered) or "none"
            raise BadRequest(f"tool_choice asks for a tool that is not in tools; there: {known}", param="tool_choice")
    raise BadRequest(
        'tool_choice is "none", "auto", "required" or {"type": "function", "function": {"name": ...}}',
        param="tool_choice",
    )


def forced(tools: dict[str, Tool], limit: int | None) -> Grammar:
    """`[{"name": ..., "parameters": {...}}, ...]`; each tool's schema is kept whole, and its references follow it."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "parameters": {"$ref": f"#/$defs/{index}"}},
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for index, name in enumerate(tools)
    ]
    schemas = {str(index): _moved(_parameters(tool), f"#/$defs/{index}") for index, tool in enumerate(tools.values())}
    array: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}, "$defs": schemas}
    if limit is not None:
        array["maxItems"] = limit
    return Grammar("json_schema", msgspec.json.encode(array).decode())


def _name(tool: Tool, index: int) -> str:
    function = tool.get("function")
    if not isinstance(function, dict):
        function = {}
    name = function.get("name")
    if tool.get("type", "function") != "function" or not isinstance(name, str) or not name:
        raise BadRequest('a tool is {"type": "function", "function": {"name": ...}}', param=f"tools[{index}]")
    if not isinstance(function.get("parameters"), dict | None):
        raise BadRequest("parameters are a JSON schema (an object)", param=f"tools[{index}].function.parameters")
    return name


def _parameters(tool: Tool) -> dict[str, Any]:
    schema = tool["function"].get("parameters")
    if not schema:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return {"type": "object", **schema}


def _moved(schema: Any, to: str) -> Any:
    """The schema with its references into itself, `#` and `#/...`, as seen from a document that has it at `to`."""
    if isinstance(schema, list):
        return [_moved(part, to) for part in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(part, to) for key, part in schema.items()}
    target = moved.get("$ref")
    if isinstance(target, str) and target.startswith("#"):
        moved["$ref"] = to + target[1:]
    return moved
