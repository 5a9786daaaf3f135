"""The description of the interface, and what is really served."""

from __future__ import annotations

import re
from typing import Any

from starlette.routing import Route

from baton.gateway.inference import PAIRED
from baton.gateway.openapi import document
from tests.gateway.stack import RECEIPT, Stack, with_stack
from tests.router.mocks import whole

OTHER_NAMES = {
    "GET /get_model_info",
    "GET /get_server_info",
    "GET /get_loads",
    "GET /flush_cache",
    "PATCH /workers/{id}",
    "DELETE /workers",
    "GET /dashboard",
    "GET /openapi.json",
}
"""Second names of what is described, and pages for people."""


def described() -> set[str]:
    return {f"{method.upper()} {path}" for path, item in document()["paths"].items() for method in item}


def test_all_that_is_served_is_described() -> None:
    async def check(s: Stack) -> None:
        routes = [route for route in s.gateway.control.app().routes if isinstance(route, Route)]
        served = {
            f"{method} {re.sub(':path', '', route.path)}"
            for route in routes
            for method in (route.methods or set()) - {"HEAD"}
        }
        served |= {f"POST {path}" for path in ("/v1/completions", "/v1/chat/completions", "/generate")}
        served |= {f"POST {path}" for path in ("/tokenize", "/detokenize")}
        assert served - OTHER_NAMES == described()
        assert {path for path in PAIRED if f"POST {path}" not in described()} == {"/v1/responses", "/v1/messages"}
        assert (await s.client.get("/openapi.json")).json() == document()

    with_stack(RECEIPT, whole({}), check)


def test_references_lead_somewhere() -> None:
    schemas = document()["components"]["schemas"]

    def references(part: Any) -> list[str]:
        if isinstance(part, list):
            return [found for one in part for found in references(one)]
        if not isinstance(part, dict):
            return []
        return [part["$ref"]] if "$ref" in part else [found for one in part.values() for found in references(one)]

    found = references(document())
    assert found
    assert {one.rpartition("/")[2] for one in found} == set(schemas)
    assert all(one.startswith("#/components/schemas/") for one in found)
