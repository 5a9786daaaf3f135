"""Where models come from: each source fills an empty directory or says in one sentence why it cannot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec

from baton.base.errors import Unavailable
from baton.models.progress import Progress


class SourceFailed(Exception):
    """This source cannot deliver; the next one may. The text is one sentence for a person."""


class PullFailed(Unavailable):
    """No source could deliver: lists what was tried, why it failed and what to do."""

    code = "pull_failed"


class Source(Protocol):
    name: str
    """For people: "the Hub", "PyPI package x"."""

    def fetch(self, into: Path, progress: Progress) -> None:
        """Fills `into` so that `missing(into)` is empty, or raises `SourceFailed`. Left-overs of an earlier try
        of the same source may be there, to be used or overwritten."""
        ...


class WithSampling:
    """Another source, and sampling defaults for its generation_config.json where that has none."""

    def __init__(self, source: Source, sampling: Mapping[str, float]) -> None:
        self.name = source.name
        self._source = source
        self._sampling = sampling

    def fetch(self, into: Path, progress: Progress) -> None:
        self._source.fetch(into, progress)
        path = into / "generation_config.json"
        own = msgspec.json.decode(path.read_bytes(), type=dict[str, Any]) if path.is_file() else {}
        write_json(path, {"do_sample": True, **self._sampling, **own})


def write_json(path: Path, value: Any) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")


def missing(directory: Path, weights: bool = True) -> str:
    """What a model directory lacks to be served, `""` if nothing: `no config.json`, `no model-2-of-3.safetensors`."""
    if not (directory / "config.json").is_file():
        return "no config.json"
    if not weights or (directory / "model.safetensors").is_file():
        return ""
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return "no model.safetensors and no model.safetensors.index.json"
    lost = [shard for shard in _shards(index) if not (directory / shard).is_file()]
    return f"no {lost[0]}" if lost else ""


def missing_tokenizer(directory: Path) -> str:
    """What a directory lacks to tokenize with, `""` if nothing."""
    return "" if (directory / "tokenizer.json").is_file() else "no tokenizer.json"


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def _shards(index: Path) -> list[str]:
    weight_map = msgspec.json.decode(index.read_bytes(), type=_Index).weight_map
    return sorted(set(weight_map.values()))
