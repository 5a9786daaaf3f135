"""Every example runs, and is short enough to read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.stacks import Stack, serve

FLAGS = ("--kv-pages", "512", "--page-size", "8", "--max-model-len", "2048")
"""Room for the longest prompt, 400 words of three tokens each in the tiny model's vocabulary."""
FLAGS = ("--kv-pages", "256", "--max-model-len", "2048")
EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


@pytest.fixture(scope="module")
def stack(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    with serve(tiny_model_dir, "native(P:d1t1p1|D:d1t1p1)", tmp_path_factory.mktemp("examples"), *FLAGS) as running:
        yield running


@pytest.mark.parametrize("example", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_example(stack: Stack, example: Path) -> None:
    assert len(example.read_text().splitlines()) < 40
    environment = {**os.environ, "BATON_URL": stack.url}
    result = subprocess.run([sys.executable, str(example)], env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
