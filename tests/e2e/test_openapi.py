"""Everything that the description of the gateway's interface allows, and much that it does not, against real workers:
nothing hangs, nothing is our fault, and answers are as described."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import CHECKS
from schemathesis.core.result import Ok

from baton.gateway.openapi import document
from tests.e2e.stacks import Stack

SCHEMA = schemathesis.openapi.from_dict(document())
OPERATIONS = [result.ok() for result in SCHEMA.get_all_operations() if isinstance(result, Ok)]
GENTLE = [op for op in OPERATIONS if not (op.path.startswith("/workers") and op.method != "get")]
"""Those that do not take the workers away."""
CASES = [
    pytest.param(op, mode, id=f"{op.label} {mode.value}")
    for op in GENTLE
    for mode in GenerationMode
    if mode is GenerationMode.POSITIVE or op.body or op.query  # else there is nothing that could be wrong
]
AS_DESCRIBED: Any = CHECKS.get_by_names(
    ["status_code_conformance", "content_type_conformance", "response_schema_conformance", "not_a_server_error"]
)
EXAMPLES = 5
"""Of each operation and kind."""
PATIENCE = 20.0
"""Seconds for an answer."""


@pytest.mark.parametrize(("operation", "mode"), CASES)
def test_all_that_is_described(pds: dict[str, Stack], operation: Any, mode: GenerationMode) -> None:
    stack = pds["shm"]
    everything = HealthCheck.filter_too_much, HealthCheck.too_slow, HealthCheck.function_scoped_fixture

    with requests.Session() as session:

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=everything,
        )
        @given(operation.as_strategy(mode))
        def attempt(case: Case[Any]) -> None:
            response = case.call(base_url=stack.url, session=session, timeout=PATIENCE)
            case.validate_response(response, checks=AS_DESCRIBED)

        attempt()
    stack.assert_clean()


def test_the_description_is_served(pds: dict[str, Stack]) -> None:
    assert httpx.get(f"{pds['shm'].url}/openapi.json", verify=False).json() == document()
