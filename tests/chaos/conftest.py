"""The workers that this folder's tests torment: started once, and the right answers learned once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.load import Load
from tests.chaos.stage import BACKEND, flags
from tests.e2e.stacks import Stack, serve


@pytest.fixture(scope="package")
def stack(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with serve(tiny_model_dir, BACKEND, tmp_path_factory.mktemp("chaos"), *flags()) as running:
        yield running


@pytest.fixture(scope="package")
def load(stack: Stack) -> Load:
    load = Load()
    asyncio.run(load.learn(stack.url))
    return load
