from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .rig import Rig, make_model_dir, serving


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_dir(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rig(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with serving(model_dir, tmp_path_factory.mktemp("run")) as rig:
        yield rig


@pytest.fixture
def fresh(model_dir: Path, tmp_path: Path) -> Iterator[Rig]:
    """A rig of its own, for tests that kill things."""
    with serving(model_dir, tmp_path) as rig:
        yield rig
