"""From what a person types to a directory, or to a sentence that helps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from baton.base.errors import ConfigError
from baton.models import CATALOG, Store, home, pull, resolve, resolve_tokenizer


def make(directory: Path, *files: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for file in files:
        (directory / file).write_text("{}")
    return directory


def test_a_directory(tmp_path: Path) -> None:
    assert resolve(str(make(tmp_path / "m", "config.json", "model.safetensors"))) == (tmp_path / "m").resolve()


def test_dummy_needs_only_a_config(tmp_path: Path) -> None:
    make(tmp_path, "config.json")
    assert resolve(str(tmp_path), load_format="dummy") == tmp_path.resolve()
    with pytest.raises(ConfigError, match=r"no model.safetensors"):
        resolve(str(tmp_path))


def test_a_directory_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not a model directory: no config.json"):
        resolve(str(tmp_path), load_format="dummy")


def test_all_shards_must_be_there(tmp_path: Path) -> None:
    make(tmp_path, "config.json", "a.safetensors")
    index = {"metadata": {}, "weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"no b.safetensors"):
        resolve(str(tmp_path))
    (tmp_path / "b.safetensors").touch()
    assert resolve(str(tmp_path)) == tmp_path.resolve()


def test_a_short_name_in_the_cache(tmp_path: Path) -> None:
    there = make(tmp_path / "models" / "smollm2-135m", "config.json", "model.safetensors")
    assert resolve("smollm2-135m", store=Store(tmp_path)) == there
    assert pull("smollm2-135m", store=Store(tmp_path)) == there


@pytest.mark.parametrize("name", ["smolm2-135m", "SmolLM2-135M"])
def test_a_name_that_is_nearly_right(name: str) -> None:
    with pytest.raises(ConfigError, match=r'did you mean "smollm2-135m"\?.*a directory or a Hub id'):
        resolve(name)


@pytest.mark.parametrize("name", ["./nothing", "/nothing/here", "~/nothing-here", "a/b/c"])
def test_a_path_that_does_not_exist(name: str) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        resolve(name)


def test_pull_takes_short_names_only() -> None:
    with pytest.raises(ConfigError, match="unknown model"):
        pull("org/name")


def test_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_HOME", "/somewhere/else")
    assert home() == Path("/somewhere/else")
    monkeypatch.setenv("BATON_HOME", "")
    assert home() == Path.home() / ".cache" / "baton"


def test_names_are_names() -> None:
    assert all(name == name.lower() and "/" not in name for name in CATALOG)


def test_nothing_heavy_is_imported_for_a_model_that_is_there(tmp_path: Path) -> None:
    make(tmp_path, "config.json", "model.safetensors")
    code = (
        "import sys; from baton.models import resolve; resolve(sys.argv[1]);"
        "print(*({'torch', 'transformers', 'huggingface_hub', 'gguf', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("name", ["smollm2-135m", "."])
def test_only_the_hub_has_revisions(name: str) -> None:
    with pytest.raises(ConfigError, match=r'revision "v1" works with Hub ids'):
        resolve(name, revision="v1")


def test_a_tokenizer_alone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not a tokenizer's directory: no tokenizer.json"):
        resolve_tokenizer(str(tmp_path))
    make(tmp_path, "tokenizer.json")
    assert resolve_tokenizer(str(tmp_path)) == tmp_path.resolve()
    with pytest.raises(ConfigError, match="unknown model"):
        resolve_tokenizer("nothing")
