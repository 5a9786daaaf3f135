"""What all rooms' tests share: two models, the leak checks, and no silent skips in CI."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from baton.models import PullFailed, resolve
from tests import leaks, tiny_model

if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, by whichever test comes first

IN_CI = bool(os.environ.get("BATON_CI"))
UNASKED_SKIP = "skipped in CI; if it may be, mark the test optional_here. Reason: "


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers in float32 with a byte-level BPE tokenizer and a chat template, as on the Hub."""
    return tiny_model.write(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real SmolLM2-135M-Instruct, pulled if it is not in the cache. Tests that use it are marked slow."""
    try:
        return resolve("smollm2-135m")
    except PullFailed as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Threads, child processes, sockets and shared memory after a test: those that were there before it.

    Fixtures of a wider scope are set up before this one looks, so what they hold is theirs.
    """
    before = leaks.look()
    yield
    left = leaks.left_since(before)
    assert not left, "left behind by this test:\n" + "\n".join(f"  {what}" for what in left)


@pytest.fixture(autouse=True, scope="session")
def nothing_is_left_at_the_end() -> Iterator[None]:
    """The same for the fixtures of wider scope."""
    before = leaks.look()
    yield
    left = leaks.left_since(before)
    assert not left, "left behind by the session:\n" + "\n".join(f"  {what}" for what in left)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "smollm2" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if IN_CI and report.skipped and not hasattr(report, "wasxfail") and not item.get_closest_marker("optional_here"):
        report.outcome = "failed"
        report.longrepr = UNASKED_SKIP + str(report.longrepr)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if IN_CI and report.skipped:
        report.outcome = "failed"
        report.longrepr = UNASKED_SKIP + str(report.longrepr)
    return report
