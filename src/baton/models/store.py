"""The cache of models on this machine.

<home>/models/smollm2-135m/           complete, or not there at all
<home>/models/.smollm2-135m.partial/  a pull in progress or an interrupted one
<home>/models/.smollm2-135m.lock      one pull at a time; the kernel drops it when its holder dies
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from baton.models.progress import Progress
from baton.models.source import PullFailed, Source, SourceFailed, missing


def home() -> Path:
    """`$BATON_HOME`, or `~/.cache/baton`."""
    return Path(os.environ.get("BATON_HOME") or "~/.cache/baton").expanduser()


class Store:
    def __init__(self, root: Path | None = None) -> None:
        self._root = (root or home()) / "models"

    def path(self, name: str) -> Path:
        return self._root / name

    def has(self, name: str) -> bool:
        return not missing(self.path(name))

    def install(self, name: str, sources: Sequence[Source], progress: Progress) -> Path:
        """The directory of model `name`, fetched from the first of `sources` that can, if it is not there yet.

        Raises `PullFailed` if none can. Whoever looks at the directory from outside sees all of it or nothing.
        """
        if self.has(name):
            return self.path(name)
        self._make_root(name)
        with self._locked(name, progress):
            if not self.has(name):
                self._fetch(name, sources, progress)
        return self.path(name)

    def _make_root(self, name: str) -> None:
        try:
            self._root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PullFailed(
                f"{name} cannot be stored in {self._root}: {error}; set BATON_HOME to a place that is writable"
            ) from error

    @contextlib.contextmanager
    def _locked(self, name: str, progress: Progress) -> Iterator[None]:
        with (self._root / f".{name}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress.note(f"another process is pulling {name}; waiting for it")
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _fetch(self, name: str, sources: Sequence[Source], progress: Progress) -> None:
        failures = []
        for number, source in enumerate(sources):
            partial = self._root / f".{name}.partial" / str(number)
            partial.mkdir(parents=True, exist_ok=True)
            try:
                source.fetch(partial, progress)
                self._publish(partial, name)
                return
            except SourceFailed as error:
                progress.note(f"{source.name}: {error}")
                failures.append(f"  {source.name}: {error}")
            except OSError as error:
                failures.append(f"  {source.name}: {error}")
        tried = "\n".join(failures)
        raise PullFailed(
            f"could not get model {name}. Tried:\n{tried}\n"
            "Connect this machine to one of these, or give a directory with config.json, *.safetensors and "
            f"tokenizer.json instead of the name, or copy such a directory to {self.path(name)}."
        )

    def _publish(self, partial: Path, name: str) -> None:
        lack = missing(partial)
        if lack:
            raise SourceFailed(f"what it delivered is incomplete: {lack}")
        _flush_to_disk(partial)
        final = self.path(name)
        if final.exists():  # incomplete (checked under the lock): somebody deleted files in it
            shutil.rmtree(final)
        partial.rename(final)
        shutil.rmtree(partial.parent)


def _flush_to_disk(directory: Path) -> None:
    """A rename must not become visible before the bytes it names are safe from a power cut."""
    for path in [*directory.rglob("*"), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
