"""The stacks that this folder's tests share: started once, clean after every test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.stacks import PD, SMALL, UNIFIED, Stack, serve


@pytest.fixture(scope="package")
def unified(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with serve(tiny_model_dir, UNIFIED, tmp_path_factory.mktemp("unified"), *SMALL) as stack:
        yield stack


@pytest.fixture(scope="package")
def pds(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Stack]]:
    """A prefill and a decode worker behind a gateway, by transport."""
    directory, flags = tmp_path_factory.mktemp("pd"), (*SMALL, "--disaggregation-transfer-backend")
    with (
        serve(tiny_model_dir, PD, directory, *flags, "shm") as shm,
        serve(tiny_model_dir, PD, directory, *flags, "tcp") as tcp,
    ):
        yield {"shm": shm, "tcp": tcp}


@pytest.fixture(params=["shm", "tcp"])
def pd(request: pytest.FixtureRequest, pds: dict[str, Stack]) -> Iterator[Stack]:
    """One of them; after the test it holds no request, sequence, hand-off or page, and nobody in it has died."""
    stack = pds[request.param]
    yield stack
    stack.assert_clean()


@pytest.fixture(autouse=True)
def unified_is_clean(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "unified" in request.fixturenames:
        request.getfixturevalue("unified").assert_clean()
