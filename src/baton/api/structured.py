"""Structured output in the fields of OpenAI, vLLM and SGLang: at most one of them becomes the request's grammar."""

from __future__ import annotations

from typing import Any

import msgspec

from baton.api.job import PDFields
from baton.api.sampling import (
    JSON_OBJECT,
    choice_grammar,
    one_grammar,
    schema_grammar,
    structural_grammar,
    text_grammar,
)
from baton.base.errors import BadRequest
from baton.base.messages import Grammar


class StructuredOutputs(msgspec.Struct, kw_only=True):
    """vLLM's `structured_outputs`."""

    json: Any = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Any = None


class StructuredFields(PDFields, kw_only=True):
    """A struct has one base, so these follow the fields of routers."""

    response_format: dict[str, Any] | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    json_schema: Any = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: Any = None


def grammar_of(request: StructuredFields, forced: Grammar | None = None) -> Grammar | None:
    """At most one; `forced` is what a tool choice asks for."""
    outputs = request.structured_outputs or StructuredOutputs()
    return one_grammar(
        {
            "tool_choice": forced,
            "response_format": _response_format(request.response_format),
            "structured_outputs.json": schema_grammar(outputs.json, "structured_outputs.json"),
            "structured_outputs.regex": text_grammar("regex", outputs.regex),
            "structured_outputs.choice": choice_grammar(outputs.choice, "structured_outputs.choice"),
            "structured_outputs.grammar": text_grammar("ebnf", outputs.grammar),
            "structured_outputs.json_object": JSON_OBJECT if outputs.json_object else None,
            "structured_outputs.structural_tag": structural_grammar(outputs.structural_tag),
            "guided_json": schema_grammar(request.guided_json, "guided_json"),
            "guided_regex": text_grammar("regex", request.guided_regex),
            "guided_choice": choice_grammar(request.guided_choice, "guided_choice"),
            "guided_grammar": text_grammar("ebnf", request.guided_grammar),
            "json_schema": schema_grammar(request.json_schema, "json_schema"),
            "regex": text_grammar("regex", request.regex),
            "ebnf": text_grammar("ebnf", request.ebnf),
            "structural_tag": structural_grammar(request.structural_tag),
        }
    )


def _response_format(value: dict[str, Any] | None) -> Grammar | None:
    if value is None:
        return None
    match value.get("type"):
        case "text":
            return None
        case "json_object":
            return JSON_OBJECT
        case "json_schema":
            wrapper = value.get("json_schema")
            schema = wrapper.get("schema", wrapper.get("schema_")) if isinstance(wrapper, dict) else None
            if schema is None:
                raise BadRequest("response_format.json_schema.schema is missing", param="response_format")
            return schema_grammar(schema, "response_format.json_schema.schema")
        case "structural_tag":
            return structural_grammar(value)
        case other:
            raise BadRequest(
                f"response_format.type is {other!r}; allowed: text, json_object, json_schema, structural_tag",
                param="response_format",
            )
