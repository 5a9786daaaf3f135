"""The cache: complete or not there, one pull at a time, whatever happens to the one who pulls."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
from pathlib import Path

import pytest

from baton.models import NoProgress, Progress, PullFailed, Store
from baton.models.source import SourceFailed


class Prepared:
    """A source that counts how often it is asked."""

    name = "prepared"

    def __init__(self) -> None:
        self.asked = 0

    def fetch(self, into: Path, progress: Progress) -> None:
        self.asked += 1
        (into / "config.json").write_text("{}")
        (into / "model.safetensors").write_bytes(b"weights")


class Slow(Prepared):
    """Stops half-way until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.half_way = threading.Event()
        self.go_on = threading.Event()

    def fetch(self, into: Path, progress: Progress) -> None:
        (into / "config.json").write_text("{}")
        self.half_way.set()
        assert self.go_on.wait(20)
        super().fetch(into, progress)


class Refusing(NoProgress):
    """A source that cannot."""

    name = "nowhere"

    def fetch(self, into: Path, progress: Progress) -> None:
        (into / "config.json").write_text("half")
        raise SourceFailed("the line is dead")


class Incomplete(Prepared):
    def fetch(self, into: Path, progress: Progress) -> None:
        (into / "config.json").write_text("{}")


class Interrupted(Prepared):
    def fetch(self, into: Path, progress: Progress) -> None:
        (into / "config.json").write_text("{}")
        raise KeyboardInterrupt


class Notes(NoProgress):
    def __init__(self) -> None:
        self.heard = threading.Event()
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)
        self.heard.set()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def test_fetched_once(store: Store) -> None:
    source = Prepared()
    assert not store.has("m")
    path = store.install("m", [source], NoProgress())
    assert store.install("m", [source], NoProgress()) == path
    assert source.asked == 1
    assert {file.name for file in path.iterdir()} == {"config.json", "model.safetensors"}
    assert {file.name for file in path.parent.iterdir()} == {"m", ".m.lock"}


def test_present_is_fast(store: Store) -> None:
    store.install("m", [Prepared()], NoProgress())
    begun = time.perf_counter()
    for _ in range(20):
        store.install("m", [], NoProgress())
    assert time.perf_counter() - begun < 1.0  # 50 ms each; it takes 0.05


def test_the_next_source_is_tried(store: Store) -> None:
    notes = Notes()
    path = store.install("m", [Refusing(), Prepared()], notes)
    assert (path / "config.json").read_text() == "{}"
    assert notes.texts == ["nowhere: the line is dead"]


def test_all_fail(store: Store) -> None:
    with pytest.raises(PullFailed) as caught:
        store.install("m", [Refusing(), Incomplete()], NoProgress())
    text = str(caught.value)
    assert "nowhere: the line is dead" in text
    assert "prepared: what it delivered is incomplete: no model.safetensors" in text
    assert str(store.path("m")) in text
    assert not store.path("m").exists()


def test_interrupted_leaves_nothing_half(store: Store) -> None:
    with pytest.raises(KeyboardInterrupt):
        store.install("m", [Interrupted()], NoProgress())
    assert not store.path("m").exists()
    store.install("m", [Prepared()], NoProgress())
    assert store.has("m")


def test_a_damaged_model_is_replaced(store: Store) -> None:
    path = store.install("m", [Prepared()], NoProgress())
    (path / "model.safetensors").unlink()
    (path / "stray").touch()
    store.install("m", [Prepared()], NoProgress())
    assert store.has("m")
    assert not (path / "stray").exists()


def test_two_at_once_fetch_once(store: Store) -> None:
    slow, late, notes = Slow(), Prepared(), Notes()
    first = threading.Thread(target=store.install, args=("m", [slow], NoProgress()))
    second = threading.Thread(target=store.install, args=("m", [late], notes))
    first.start()
    assert slow.half_way.wait(20)
    assert not store.path("m").exists()
    second.start()
    assert notes.heard.wait(20)  # it waits for the lock
    slow.go_on.set()
    first.join(20)
    second.join(20)
    assert store.has("m")
    assert (slow.asked, late.asked) == (1, 0)


def _pull_until_killed(root: Path, ready: str) -> None:
    class Hanging(Prepared):
        def fetch(self, into: Path, progress: Progress) -> None:
            (into / "config.json").write_text("{}")
            Path(ready).touch()
            signal.pause()

    Store(root).install("m", [Hanging()], NoProgress())


def test_the_lock_of_a_dead_process_is_free(store: Store, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    child = multiprocessing.get_context("spawn").Process(target=_pull_until_killed, args=(tmp_path, str(ready)))
    child.start()
    try:
        deadline = time.monotonic() + 30
        while not ready.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert ready.exists()
    finally:
        child.kill()
        child.join(20)
        child.close()
    source = Prepared()
    store.install("m", [source], NoProgress())
    assert source.asked == 1


def test_a_place_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "models").touch()
    with pytest.raises(PullFailed, match="BATON_HOME"):
        Store(tmp_path).install("m", [Prepared()], NoProgress())
