"""Every example runs, and is short enough to read."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.stacks import PD, Stack, serve

FLAGS = ("--kv-pages", "512", "--page-size", "8", "--max-model-len", "2048")
"""Room for the longest prompt, 400 words of three tokens each in the tiny model's vocabulary."""
EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


@pytest.fixture(scope="module")
def stack(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with serve(tiny_model_dir, PD, tmp_path_factory.mktemp("examples"), *FLAGS) as running:
        yield running


@pytest.mark.parametrize("example", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_example(stack: Stack, example: Path) -> None:
    assert len(example.read_text().splitlines()) < 40
    environment = {**os.environ, "BATON_URL": stack.url}
    result = subprocess.run([sys.executable, str(example)], env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
